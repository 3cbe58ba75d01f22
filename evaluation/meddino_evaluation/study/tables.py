"""What a study shows: tables as CSV, Markdown and LaTeX, paired tests with Holm's correction, plots, one HTML page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meddino.core import html
from meddino.core.files import write_text
from meddino_evaluation.adaptation.few_shot import curve_points
from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.classification.results import ALL_DATA, Run, read_per_case
from meddino_evaluation.metrics.classification import METRICS
from meddino_evaluation.metrics.classification_bootstrap import paired_metric
from meddino_evaluation.metrics.statistics import can_be_significant, delong, holm, wilcoxon_signed_rank
from meddino_evaluation.metrics.text_table import Table, metric_text
from meddino_evaluation.study.classification_jobs import FEW_SHOT, ClassificationJob, StudyKind
from meddino_evaluation.study.config import StudyConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Sequence[tuple[ClassificationJob, dict[str, Any]]]
_COMPACT = ("kappa", "auroc", "auprc", "balanced_accuracy")
"""What a paper's table shows of `_COLUMNS`, with the calibration error; the best of a data set in bold."""
_COLUMNS = ("kappa", "auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "brier", "ece")


def write_study(kind: StudyKind, config: StudyConfig, found: Found, out: Path, missing: Sequence[str]) -> None:
    """Write results.csv, .md, .tex, comparison.csv, .md, .tex and report.html.

    Args:
        kind: Which study.
        config: Its settings.
        found: Finished jobs with their metrics.
        out: Folder.
        missing: Lines about jobs that are not done.
    """
    results = results_table(kind, config, found)
    comparison = comparison_table(config, found, out)
    results.write(out, "results")
    kept = ("data", "model", "protocol", "backbone", "training", *_COMPACT, "ece")
    compact = results.only(kept).best_in_bold(("data", "training"), _COMPACT, ("ece",))
    compact.write(out, "results_compact")
    comparison.write(out, "comparison")
    write_text(out / "report.html", _page(kind, config, found, results, comparison, missing))


def results_table(kind: StudyKind, config: StudyConfig, found: Found) -> Table:
    """Return one row for each data set, model, protocol and setting."""
    names = [name for name in _COLUMNS if any(name in METRICS[content["data"]["task"]] for _, content in found)]
    first = "backbone" if kind == "freeze" else "protocol"
    rows = []
    for job, content in found:
        for entry in content["results"]:
            label = entry["protocol"]
            if kind == "freeze":
                label = "frozen" if entry["protocol"] == config.frozen else "unfrozen"
            cells = [metric_text(entry["metrics"].get(name)) for name in names]
            size = f"{content['model']['parameters'] / 1e6:.1f}"
            setting = entry["setting"] if entry["setting"] != ALL_DATA else "all"
            rows.append((content["data"]["name"], model_name(job.model), size, label, setting, str(entry["runs"]), *cells))
    return Table(("data", "model", "parameters [M]", first, "training", "runs", *names), tuple(rows))


def comparison_table(config: StudyConfig, found: Found, out: Path) -> Table:
    """Compare every model with the first, on the same cases, over patients: permutations, Wilcoxon, DeLong; Holm over all."""
    groups: dict[tuple[str, str, str], list[tuple[ClassificationJob, dict[str, Any]]]] = {}
    for job, content in found:
        for entry in content["results"]:
            groups.setdefault((content["data"]["name"], entry["protocol"], entry["setting"]), []).append((job, content))
    rows, values = [], []
    for (data, protocol, setting), members in groups.items():
        reference, *others = members
        for other in others:
            tests = _paired(config, reference, other, protocol, setting, out)
            if tests is not None:
                names = (model_name(other[0].model), model_name(reference[0].model))
                rows.append((data, protocol, setting, *names, *tests[0]))
                values.append(tests[1])
    adjusted = [holm([value[test] for value in values]) for test in range(3)] if values else []
    full = [
        (*row, *(_p_text(value) for value in raw), *(_p_text(float(column[place])) for column in adjusted))
        for place, (row, raw) in enumerate(zip(rows, values, strict=True))
    ]
    header = (
        "data",
        "protocol",
        "training",
        "model",
        "reference",
        "metric",
        "difference",
        "smallest p",
        "p permutation",
        "p Wilcoxon",
        "p DeLong",
    )
    return Table((*header, "Holm permutation", "Holm Wilcoxon", "Holm DeLong"), tuple(full))


def _p_text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _paired(
    config: StudyConfig,
    reference: tuple[ClassificationJob, dict[str, Any]],
    other: tuple[ClassificationJob, dict[str, Any]],
    protocol: str,
    setting: str,
    out: Path,
) -> tuple[tuple[str, str, str], tuple[float, float, float]] | None:
    kind, classes = reference[1]["data"]["task"], reference[1]["data"]["classes"]
    runs = []
    for job, _ in (other, reference):
        every = read_per_case(out / "jobs" / job.folder / "per_case.csv", classes, kind)
        runs.append([run for run in every if (run.protocol, run.setting) == (protocol, setting)])
    if [(run.repeat, run.draw, run.ids) for run in runs[0]] != [(run.repeat, run.draw, run.ids) for run in runs[1]]:
        return None  # not the same test cases: nothing to pair
    metric = plot_metric(config, kind)
    settings = config.evaluation.statistics
    result = paired_metric(
        kind,
        [(run.patients, run.truth, run.probabilities) for run in runs[0]],
        [(run.patients, run.truth, run.probabilities) for run in runs[1]],
        metric,
        resamples=settings.resamples,
        level=settings.level,
        seed=config.evaluation.split.seed,
    )
    text = f"{result.difference:+.3f}"
    if not math.isnan(result.low):
        text += f" [{result.low:+.3f}, {result.high:+.3f}]"
    rank = wilcoxon_signed_rank(*(_by_patient(kind, one) for one in runs), level=settings.level)
    smallest = f"{result.smallest_p:.2g}"
    return (metric, text, smallest), (result.p_value, rank, _delong(kind, runs[0], runs[1], settings.level))


def plot_metric(config: StudyConfig, kind: str) -> str:
    """Return the metric that plots and tests look at."""
    if config.metric != "auto":
        return config.metric
    return "kappa" if kind == "ordinal" else "auroc"


def _by_patient(kind: str, runs: Sequence[Run]) -> NDArray[np.float64]:
    """Return each patient's mean probability of the truth, over cases and runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for place, patient in enumerate(run.patients):
            if kind == "multilabel":
                known = run.truth[place] != -1
                right = np.where(run.truth[place] == 1, run.probabilities[place], 1 - run.probabilities[place])
                values.setdefault(patient, []).extend(right[known].tolist())
            else:
                values.setdefault(patient, []).append(float(run.probabilities[place, run.truth[place]]))
    return np.array([np.mean(values[patient]) if values[patient] else np.nan for patient in sorted(values)])


def _delong(kind: str, runs_a: Sequence[Run], runs_b: Sequence[Run], level: float) -> float:
    """Return DeLong's p value for a binary task whose patients have one label each; else NaN: rows would not be independent.

    Also NaN with fewer patients than any test needs to reach 1 - level.
    """
    if kind != "binary":
        return math.nan
    labels: dict[str, set[int]] = {}
    scores: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for side, runs in enumerate((runs_a, runs_b)):
        for run in runs:
            for place, patient in enumerate(run.patients):
                labels.setdefault(patient, set()).add(int(run.truth[place]))
                scores[side].setdefault(patient, []).append(float(run.probabilities[place, 1]))
    single = sorted(patient for patient, found in labels.items() if len(found) == 1)
    truth = [next(iter(labels[patient])) for patient in single]
    if len(single) < len(labels) or not can_be_significant(len(single), level) or min(truth.count(0), truth.count(1)) < 2:
        return math.nan
    means = [[float(np.mean(side[patient])) for patient in single] for side in scores]
    return delong(truth, means[0], means[1]).p_value


def _page(kind: StudyKind, config: StudyConfig, found: Found, results: Table, comparison: Table, missing: Sequence[str]) -> str:
    sections = [
        html.Section(
            "Results",
            html.join(
                html.text(
                    "Mean ± standard deviation over runs (splits, seeds, draws) [interval over patients, percentile bootstrap]."
                ),
                html.table(results.header, results.rows),
            ),
        )
    ]
    pictures = [html.figure(drawing, caption) for caption, drawing in _plots(kind, config, found).items()]
    if pictures:
        sections.append(html.Section("Plots", html.join(*pictures)))
    if comparison.rows:
        words = (
            "Differences to the first model on the same cases, over patients; p values as they are and by Holm over the table. "
            "Permutation: all exchanges of the two models up to 13 patients, beyond as many as resamples. Intervals and p "
            "values are left out with fewer than six patients, who cannot reach p < 0.05."
        )
        sections.append(
            html.Section("Paired comparison", html.join(html.text(words), html.table(comparison.header, comparison.rows)))
        )
    notes = sorted({f"{content['data']['name']}: {note}" for _, content in found for note in _notes(content)})
    sections.append(
        html.Section("Notes", html.join(*(html.text(note, "note") for note in notes)) if notes else html.text("None."))
    )
    if missing:
        sections.append(html.Section("Not done", html.join(*(html.text(line, "warning") for line in missing))))
    models, data = {job.model for job, _ in found}, {content["data"]["name"] for _, content in found}
    lead = f"{len(found)} jobs; {len(models)} models, {len(data)} data sets"
    return html.page(f"Study: {kind}", lead, sections)


def _notes(content: Mapping[str, Any]) -> list[str]:
    return [*content["notes"], *(note for entry in content["results"] for note in entry["notes"])]


def _plots(kind: StudyKind, config: StudyConfig, found: Found) -> dict[str, "Figure"]:
    plots = {}
    for data in dict.fromkeys(content["data"]["name"] for _, content in found):
        members = [(job, content) for job, content in found if content["data"]["name"] == data]
        metric = plot_metric(config, members[0][1]["data"]["task"])
        if kind == FEW_SHOT:
            plots[f"{data}: {metric} by training patients a class"] = _curves(members, metric, data)
        else:
            plots[f"{data}: {metric} with intervals over patients"] = _intervals(members, metric, data)
    return plots


def _curves(members: Found, metric: str, data: str) -> "Figure":
    drawing, axes = _axes(5.6, 3.6)
    ticks: set[float] = set()
    for job, content in members:
        for protocol in dict.fromkeys(entry["protocol"] for entry in content["results"]):
            own = [entry for entry in content["results"] if entry["protocol"] == protocol]
            values = {entry["setting"]: entry["metrics"][metric] for entry in own}
            for family, style in (("shots", "-"), ("fraction", "--")):
                points = {
                    end: curve_points(
                        {name: one[end] for name, one in values.items() if name.startswith(family) and one[end] is not None}
                    )
                    for end in ("mean", "low", "high")
                }
                if not points["mean"]:
                    continue
                x = [point[0] for point in points["mean"]]
                label = f"{model_name(job.model)}, {protocol}" + (" (fraction)" if family == "fraction" else "")
                (line,) = axes.plot(x, [point[1] for point in points["mean"]], style, marker="o", markersize=3.5, label=label)
                if len(points["low"]) == len(x):
                    ends = ([point[1] for point in points["low"]], [point[1] for point in points["high"]])
                    axes.fill_between(x, *ends, alpha=0.12, color=line.get_color())
                ticks.update(x)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.set(xlabel="training patients a class (or share of patients)", ylabel=metric)
    return _finished(drawing, axes, data)


def _intervals(members: Found, metric: str, data: str) -> "Figure":
    protocols = list(dict.fromkeys(entry["protocol"] for _, content in members for entry in content["results"]))
    models = list(dict.fromkeys(job.model for job, _ in members))
    drawing, axes = _axes(max(4.5, 1.1 * len(protocols) + 1.5), 3.4)
    for number, model in enumerate(models):
        x, y, below, above = [], [], [], []
        for job, content in members:
            for entry in content["results"] if job.model == model else []:
                values = entry["metrics"].get(metric)
                if values and values["mean"] is not None:
                    x.append(protocols.index(entry["protocol"]) + (number - (len(models) - 1) / 2) * 0.6 / max(1, len(models)))
                    y.append(values["mean"])
                    known = values["low"] is not None
                    below.append(max(0.0, values["mean"] - values["low"]) if known else 0.0)
                    above.append(max(0.0, values["high"] - values["mean"]) if known else 0.0)
        axes.errorbar(x, y, yerr=[below, above], fmt="o", markersize=4, capsize=3, label=model_name(model))
    axes.set_xticks(range(len(protocols)), protocols)
    axes.set(ylabel=metric)
    return _finished(drawing, axes, data)


def _axes(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height))
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()


def _finished(drawing: "Figure", axes: Any, title: str) -> "Figure":
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return drawing
