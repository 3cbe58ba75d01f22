"""What a study shows: tables as CSV, Markdown and LaTeX, paired tests with Holm's correction, plots, one HTML page."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meddino.core import html
from meddino.core.files import write_text
from meddino.core.html_charts import in_columns
from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.classification.report import COMPACT, UNDEFINED
from meddino_evaluation.classification.results import ALL_DATA
from meddino_evaluation.metrics.classification import LOWER_IS_BETTER, METRICS
from meddino_evaluation.metrics.figures import save_figures
from meddino_evaluation.metrics.statistics import holm
from meddino_evaluation.metrics.text_table import INTERVAL, Table, metric_text
from meddino_evaluation.study.classification_jobs import StudyKind
from meddino_evaluation.study.config import StudyConfig
from meddino_evaluation.study.paired import Comparison, Found, compare_with_first
from meddino_evaluation.study.plots import forest_plots, has_shares, study_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The tables of a study are wide as they are: the log loss says little that Brier's score does not.
_COLUMNS = [name for name in dict.fromkeys([*METRICS["ordinal"], *chain(*METRICS.values())]) if name != "log_loss"]


def write_study(
    kind: StudyKind,
    config: StudyConfig,
    found: Found,
    out: Path,
    missing: Sequence[str],
    figures: str | None = None,
    columns: Sequence[str] = COMPACT,
) -> None:
    """Write results, results_compact and comparison as .csv, .md and .tex, and report.html.

    Args:
        kind: Which study.
        config: Its settings.
        found: Finished jobs with their metrics.
        out: Folder.
        missing: Lines about jobs that are not done.
        figures: Also write every figure under figures/, in this format.
        columns: Of the compact table, in which the best numbers of a data set are bold.
    """
    results, compared = results_table(kind, config, found), compare_with_first(config, found, out)
    comparison = comparison_table(compared)
    results.write(out, "results")
    compact = results.only(("data", "model", "protocol", "backbone", "training", *columns))
    compact = compact.best_in_bold(("data", "training"), [*set(columns) - LOWER_IS_BETTER], [*LOWER_IS_BETTER])
    compact.write(out, "results_compact")
    comparison.write(out, "comparison")
    plots, forests = study_plots(kind, config, found), forest_plots(compared)
    if figures is not None:
        save_figures({**plots, **forests}, out / "figures", figures)
    write_text(out / "report.html", _page(kind, found, (compact, results), comparison, plots, forests, missing))


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


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Return one row a comparison, with p values as they are and by Holm over all of them."""
    raw = [(one.result.p_value, one.wilcoxon, one.delong) for one in comparisons]
    adjusted = [holm([values[test] for values in raw]) for test in range(3)] if raw else []
    rows = []
    for place, one in enumerate(comparisons):
        text = f"{one.result.difference:+.3f}"
        if not math.isnan(one.result.low):
            text += f" [{one.result.low:+.3f}, {one.result.high:+.3f}]"
        names = (one.data, one.protocol, one.setting, one.model, one.reference, one.metric)
        values = [*raw[place], *(float(column[place]) for column in adjusted)]
        rows.append((*names, text, f"{one.result.smallest_p:.2g}", *map(_p_text, values)))
    header = ("data", "protocol", "training", "model", "reference", "metric", "difference", "smallest p")
    tests = ("permutation", "Wilcoxon", "DeLong")
    return Table((*header, *(f"p {name}" for name in tests), *(f"Holm {name}" for name in tests)), tuple(rows))


def _p_text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _page(
    kind: StudyKind,
    found: Found,
    results: tuple[Table, Table],
    comparison: Table,
    figures: Mapping[str, "Figure"],
    forests: Mapping[str, "Figure"],
    missing: Sequence[str],
) -> str:
    sections = [
        html.Section(
            "Results",
            html.join(
                html.text(
                    f"Mean ± standard deviation over runs (splits, seeds, draws) {INTERVAL}; "
                    "of each data set and training the best in bold."
                ),
                results[0].html(UNDEFINED),
                html.details("every metric", results[1].html(UNDEFINED)),
            ),
        )
    ]
    dashes = "; dashed: by the share of patients that was trained on" if has_shares(found) else ""
    pictures = [html.figure(drawing, caption + dashes) for caption, drawing in figures.items()]
    if pictures:
        sections.append(html.Section("Plots", in_columns(pictures)))
    if comparison.rows:
        words = (
            "Differences to the first model on the same cases, over patients; p values as they are and by Holm over the table. "
            "Permutation: all exchanges of the two models up to 13 patients, beyond as many as resamples. Intervals and p "
            "values are left out with fewer than six patients, who cannot reach p < 0.05."
        )
        sections.append(
            html.Section(
                "Paired comparison",
                html.join(
                    html.text(words),
                    in_columns([html.figure(drawing, caption) for caption, drawing in forests.items()]),
                    comparison.html("fewer than six patients, or no such test for this task"),
                ),
            )
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
