"""The tables of a paper: a row a task, setting and model, published numbers beside it, tests against the first model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core import html
from meddino.core.files import write_text
from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.classification.results import read_per_case
from meddino_evaluation.detection.metrics import paired_ap50
from meddino_evaluation.detection.run import PER_CASE
from meddino_evaluation.detection.run import read_per_case as read_detections
from meddino_evaluation.metrics.classification_bootstrap import paired_metric
from meddino_evaluation.metrics.statistics import NO_RESULT, PairedResult, holm, paired_means
from meddino_evaluation.metrics.text_table import INTERVAL, Table, metric_text
from meddino_evaluation.study.lvm_med import TaskJob, data_folder
from meddino_evaluation.study.segmentation_runs import read_variant
from meddino_evaluation.tasks.definition import TaskDefinition

PUBLISHED = "published (not measured here)"
HEADER = ("task", "kind", "setting", "metric", "model", "measured", PUBLISHED)
_PICTURES = 2
"""Of each job at most so many pictures are shown."""
_RESAMPLES = 2000
_Side = tuple[TaskJob, Mapping[str, Any]]
Found = Sequence[_Side]


def write_task_study(found: Found, missing: Sequence[TaskDefinition], problems: Sequence[str], root: Path, out: Path) -> Table:
    """Write results, comparison and missing as .csv, .md and .tex, and report.html.

    Args:
        found: Finished jobs with their metrics.
        missing: Tasks whose data are not there.
        problems: Lines about jobs that could not run.
        root: Where data were looked for.
        out: Folder of the study.

    Returns:
        The table of results.
    """
    results = results_table(found)
    results.write(out, "results")
    comparison = pairs_table(compare_tasks(found, out))
    comparison.write(out, "comparison")
    absent = missing_table(missing, root)
    absent.write(out, "missing")
    write_text(out / "report.html", _page(found, results, comparison, absent, problems, out))
    return results


def headlines(task: TaskDefinition, content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (setting, metric with mean, deviation and interval) of a metrics.json: by protocol, or by site."""
    if content.get("format") == "meddino-classification":
        for entry in content["results"]:
            yield entry["protocol"], {"metric": "accuracy", **entry["metrics"]["accuracy"]}
        return
    yield "overfit, no result" if content.get("overfit") else own_setting(task), content["headline"]
    yield from content.get("headline_by_site", {}).items()


def own_setting(task: TaskDefinition) -> str:
    """Return the setting of a task's own test: the sites that are trained on, or "" where none is special."""
    return "+".join(task.train_sites)


def results_table(found: Found) -> Table:
    """Return one row for each task, setting and model."""
    rows = []
    for job, content in found:
        for setting, values in headlines(job.task, content):
            first = (job.task.name, job.task.kind, setting or "–", values["metric"], model_name(job.model))
            rows.append((*first, metric_text(values), published_text(job.task, values["metric"], setting)))
    return Table(HEADER, tuple(rows)).best_in_bold(("task", "setting", "metric"), ["measured"])


def published_text(task: TaskDefinition, metric: str, setting: str) -> str:
    """Return what others printed on a task in this setting, percent as printed; a dash where nobody did."""
    own = [one for one in task.published if one.metric == metric and one.setting == setting]
    return "; ".join(f"{one.model} {one.value:.2f} % [{one.source}]" for one in own) or "–"


def missing_table(missing: Sequence[TaskDefinition], root: Path) -> Table:
    """Return a row for each task whose data are not there: where they are looked for and where they come from."""
    rows = tuple((task.name, task.title, str(data_folder(task, root)), task.where, task.licence) for task in missing)
    return Table(("task", "data", "looked for in", "from", "licence"), rows)


@dataclass(frozen=True)
class Pair:
    """One model against the reference on one task in one setting."""

    task: str
    setting: str
    metric: str
    model: str
    reference: str
    result: PairedResult


def compare_tasks(found: Found, out: Path) -> list[Pair]:
    """Compare every model with the first of each task; a pair that was tested on other cases has no result."""
    tasks: dict[str, list[_Side]] = {}
    for job, content in found:
        tasks.setdefault(job.task.name, []).append((job, content))
    pairs = []
    for task, (first, *others) in tasks.items():
        for other in others:
            names = model_name(other[0].model), model_name(first[0].model)
            for setting, metric, result in _paired(other, first, out / "jobs"):
                pairs.append(Pair(task, setting, metric, *names, result))
    return pairs


def pairs_table(pairs: Sequence[Pair]) -> Table:
    """Return one row a pair, with p values as they are and by Holm over all of them."""
    adjusted = holm([pair.result.p_value for pair in pairs])
    rows = []
    for pair, corrected in zip(pairs, adjusted, strict=True):
        one = pair.result
        difference = "not the same cases" if one is NO_RESULT else f"{one.difference:+.3f}"
        if not math.isnan(one.low):
            difference += f" [{one.low:+.3f}, {one.high:+.3f}]"
        names = (pair.task, pair.setting or "–", pair.metric, pair.model, pair.reference)
        rows.append((*names, difference, *("–" if math.isnan(p) else f"{p:.4f}" for p in (one.p_value, float(corrected)))))
    header = ("task", "setting", "metric", "model", "reference", "difference", "p permutation", "p Holm")
    return Table(header, tuple(rows))


def _paired(model: _Side, first: _Side, jobs: Path) -> list[tuple[str, str, PairedResult]]:
    kind = model[0].task.kind
    if kind == "classification":
        return _classification(model, first, jobs)
    if kind == "detection":
        classes = model[1]["data"]["classes"]
        runs = [read_detections(jobs / job.folder / PER_CASE, classes) for job, _ in (model, first)]
        same = [[(one.name, one.patient) for one in run] for run in runs[0]] == [
            [(one.name, one.patient) for one in run] for run in runs[1]
        ]
        return [("", "ap50", paired_ap50(runs[0], runs[1], len(classes), resamples=_RESAMPLES) if same else NO_RESULT)]
    return _segmentation(model, first, jobs)


def _classification(model: _Side, first: _Side, jobs: Path) -> list[tuple[str, str, PairedResult]]:
    data = model[1]["data"]
    runs = [read_per_case(jobs / job.folder / "per_case.csv", data["classes"], data["task"]) for job, _ in (model, first)]
    found = []
    for protocol in dict.fromkeys(run.protocol for run in runs[0]):
        own = [[run for run in side if run.protocol == protocol] for side in runs]
        same = [(run.repeat, run.ids) for run in own[0]] == [(run.repeat, run.ids) for run in own[1]]
        sides = [[(run.patients, run.truth, run.probabilities) for run in side] for side in own]
        result = paired_metric(data["task"], sides[0], sides[1], "accuracy", resamples=_RESAMPLES) if same else NO_RESULT
        found.append((protocol, "accuracy", result))
    return found


def _segmentation(model: _Side, first: _Side, jobs: Path) -> list[tuple[str, str, PairedResult]]:
    """Compare the mean over cases, of the task's own test and of every other site."""
    folders = [jobs / job.folder for job, _ in (model, first)]
    parts = {own_setting(model[0].task): folders} | {
        site: [folder / "external" / site for folder in folders] for site in model[1].get("headline_by_site", {})
    }
    metric, found = model[0].task.metric, []
    for site, (own, reference) in parts.items():
        sides = [read_variant("", folder) for folder in (own, reference)]
        values = [side.by_case(metric) for side in sides]
        cases = sorted(values[0].keys() & values[1].keys())
        patient = {row["case"]: row["patient"] for row in sides[0].rows}
        result = NO_RESULT
        if cases and values[0].keys() == values[1].keys():
            columns = [[side[case] for case in cases] for side in values]
            result = paired_means(columns[0], columns[1], groups=[patient[case] for case in cases], resamples=_RESAMPLES)
        found.append((site, metric, result))
    return found


def _page(found: Found, results: Table, comparison: Table, absent: Table, problems: Sequence[str], out: Path) -> str:
    words = (
        f"Measured: mean ± deviation over seeds or runs {INTERVAL}, between 0 and 1. Published: percent, as "
        "printed by others, on their own splits: to stand beside ours, not to be tested against them."
    )
    notes = sorted({f"{job.task.name}: {note}" for job, content in found for note in _notes(job.task, content)})
    sections = [html.Section("Results", html.join(html.text(words), html.table(results.header, results.rows)))]
    if comparison.rows:
        tested = (
            "Differences to the first model on the same test cases, over patients: bootstrap interval and permutation test, as "
            "it is and by Holm over the table; a dash where fewer than six patients can tell nothing."
        )
        sections.append(
            html.Section("Comparison", html.join(html.text(tested), html.table(comparison.header, comparison.rows)))
        )
    pictures = [one for job, _ in found for one in _pictures(job, out)]
    if pictures:
        sections.append(html.Section("Pictures", html.join(*pictures)))
    if notes:
        sections.append(html.Section("Notes", html.join(*(html.text(note, "note") for note in notes))))
    used = {job.task.name: job.task for job, _ in found}
    rows = [(name, one.title, one.citation, one.licence, one.split_rule) for name, one in used.items()]
    sections.append(html.Section("Data", html.table(("task", "data", "to cite", "licence", "split"), rows)))
    if problems:
        sections.append(html.Section("Not done", html.join(*(html.text(line, "warning") for line in problems))))
    if absent.rows:
        sections.append(html.Section("Data that are missing", html.table(absent.header, absent.rows)))
    models, tasks = {job.model for job, _ in found}, {job.task.name for job, _ in found}
    return html.page("Study: the tasks of the field", f"{len(found)} jobs; {len(models)} models, {len(tasks)} tasks", sections)


def _notes(task: TaskDefinition, content: Mapping[str, Any]) -> list[str]:
    return [*([task.notes] if task.notes else []), *content.get("notes", [])]


def _pictures(job: TaskJob, out: Path) -> list[Markup]:
    files = sorted((out / "jobs" / job.folder / "pictures").rglob("*.png"))[:_PICTURES]
    return [html.figure(file.read_bytes(), f"{job.title}: {file.stem}", width_px=480) for file in files]
