"""The report of one evaluation: tables, ROC curves, confusion, calibration, the cases that were taken for another class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from meddino.core import html
from meddino.core.errors import ConfigError
from meddino.core.files import write_text
from meddino.core.html_charts import case_plot, new_figure
from meddino_evaluation.classification.datasets import LabelledSet
from meddino_evaluation.classification.images import read_slices
from meddino_evaluation.classification.results import ALL_DATA, Run, read_per_case
from meddino_evaluation.metrics.classification import LOWER_IS_BETTER, METRICS
from meddino_evaluation.metrics.figures import confusion_figure, reliability_figure, roc_figure, save_figures
from meddino_evaluation.metrics.text_table import INTERVAL, Table, metric_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPACT = ("kappa", "auroc", "auprc", "balanced_accuracy", "ece")
"""What a paper's table shows unless other columns are chosen."""
UNDEFINED = "undefined: the test cases hold only one class"
"""What a dash in a table of metrics means."""
_SHOWN = 12
_COLUMNS = 4


@dataclass(frozen=True)
class Mistake:
    """A test case that was taken for another class.

    Attributes:
        case: Its name.
        truth: Class number.
        predicted: Class number.
        probability: Of the predicted class.
        protocol: Who was wrong.
    """

    case: str
    truth: int
    predicted: int
    probability: float
    protocol: str


def metrics_table(content: dict[str, Any]) -> Table:
    """Return one row a protocol and setting of a metrics.json."""
    names = list(content["results"][0]["metrics"])
    rows = [
        (entry["protocol"], entry["setting"], str(entry["runs"]), *(metric_text(entry["metrics"][name]) for name in names))
        for entry in content["results"]
    ]
    return Table(("protocol", "training", "runs", *names), tuple(rows))


def write_report(
    content: dict[str, Any],
    out: Path,
    dataset: LabelledSet | None = None,
    figures: str | None = None,
    columns: Sequence[str] = COMPACT,
) -> Table:
    """Write results and results_compact as .csv, .md and .tex, and report.html, beside metrics.json.

    Args:
        content: Of metrics.json.
        out: Folder of the results.
        dataset: Where the pictures of misclassified cases come from; None shows none.
        figures: Also write every figure under figures/, in this format.
        columns: Of the compact table, whose best numbers are bold.

    Returns:
        The compact table.
    """
    table = metrics_table(content)
    table.write(out, "results")
    kept = [name for name in columns if name in table.header]
    compact = table.only(("protocol", "training", *kept))
    compact = compact.best_in_bold(("training",), [*set(kept) - LOWER_IS_BETTER], [*LOWER_IS_BETTER])
    compact.write(out, "results_compact")
    runs = read_per_case(out / "per_case.csv", content["data"]["classes"], content["data"]["task"])
    drawn = _figures(content, runs, dataset)
    if figures is not None:
        save_figures(drawn, out / "figures", figures)
    write_text(out / "report.html", _page(content, table, compact, drawn, runs))
    return compact


def chosen_columns(words: str | None) -> tuple[str, ...]:
    """Return the columns of the compact table from `--columns a,b`; `COMPACT` where none are given.

    Raises:
        ConfigError: No kind of task has such a metric.
    """
    if words is None:
        return COMPACT
    columns = tuple(word.strip() for word in words.split(",") if word.strip())
    known = dict.fromkeys(name for names in METRICS.values() for name in names)
    unknown = [name for name in columns if name not in known]
    if unknown or not columns:
        raise ConfigError(f"--columns {words}: no metric {unknown[:1] or 'at all'}; known: {', '.join(known)}")
    return columns


def mistakes(runs: Sequence[Run], most: int) -> list[Mistake]:
    """Return the test cases that were misclassified, the surest mistakes first, each case once; none for several labels."""
    found: dict[str, Mistake] = {}
    for run in [one for one in runs if one.truth.ndim == 1]:
        predicted = run.probabilities.argmax(1)
        for place in np.flatnonzero(predicted != run.truth).tolist():
            number, case = int(predicted[place]), run.ids[place]
            one = Mistake(case, int(run.truth[place]), number, float(run.probabilities[place, number]), run.protocol)
            if case not in found or one.probability > found[case].probability:
                found[case] = one
    return sorted(found.values(), key=lambda one: (-one.probability, one.case))[:most]


def _figures(content: dict[str, Any], runs: Sequence[Run], dataset: LabelledSet | None) -> dict[str, "Figure"]:
    data = content["data"]
    last = {run.protocol: run.setting for run in runs}  # in few-shot the most patients
    names = {name: name if setting == ALL_DATA else f"{name}, {setting}" for name, setting in last.items()}
    outcomes = {
        names[name]: [(run.truth, run.probabilities) for run in runs if (run.protocol, run.setting) == (name, setting)]
        for name, setting in last.items()
    }
    auroc = {
        names[entry["protocol"]]: entry["metrics"]["auroc"]["mean"]
        for entry in content["results"]
        if entry["setting"] == last[entry["protocol"]]
    }
    drawn = {"roc": roc_figure(outcomes, auroc), "calibration": reliability_figure(outcomes)}
    if data["task"] != "multilabel":
        drawn |= {f"confusion-{name}": confusion_figure(own, data["classes"], name) for name, own in outcomes.items()}
    wrong = mistakes(runs, _SHOWN) if dataset is not None else []
    return drawn | ({"misclassified": _pictures(wrong, dataset)} if wrong and dataset is not None else {})


def _pictures(wrong: Sequence[Mistake], dataset: LabelledSet) -> "Figure":
    cases, classes = {case.name: case for case in dataset.cases}, dataset.config.classes
    columns = min(_COLUMNS, len(wrong))
    rows = -(-len(wrong) // columns)
    drawing, whole = new_figure(2.1 * columns, 2.5 * rows)
    whole.axis("off")
    windows: dict[str, None] = {}
    for place, one in enumerate(wrong):
        axes: Any = drawing.add_subplot(rows, columns, place + 1)
        picture, window = _picture(cases[one.case].source, dataset)
        windows[window] = None
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.axis("off")
        name = one.case if len(one.case) <= 30 else "..." + one.case[-27:]
        is_taken = f"{classes[one.truth]}, taken for {classes[one.predicted]}"
        axes.set_title(f"{name}\n{is_taken}\n{one.protocol}: {one.probability:.2f}", fontsize=6)
    drawing.supxlabel(f"black to white: {'; '.join(windows)}", fontsize=7, y=0.04)
    return drawing


def _picture(source: str, dataset: LabelledSet) -> tuple[NDArray[np.float32], str]:
    """Return the middle slice of a case in [0, 1], grey [H, W] or colour [H, W, 3], and which values are black and white."""
    stack = read_slices(source, dataset.config.modality)
    middle = len(stack.values) // 2
    image = stack.tensor(middle, middle + 1)[0].numpy()
    window = "pictures by the range of their type, other brightness from the 0.5th to the 99.5th percentile"
    if stack.kind == "hu":
        low, high = dataset.config.shown_range
        image = np.clip((image - low) / (high - low), 0, 1)
        window = f"CT from {low:g} to {high:g} HU"
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0), window


_CAPTIONS = {
    "roc": "Mean ROC curve over runs; of several classes each against the rest.",
    "calibration": "How often the prediction is right, by its confidence.",
    "misclassified": "The surest mistakes: case, its class, what it was taken for, protocol and its probability; of a volume "
    "its middle slice. These are images of patients: share this page as you would share them.",
}


def _page(content: dict[str, Any], table: Table, compact: Table, drawn: dict[str, "Figure"], runs: Sequence[Run]) -> str:
    data, model = content["data"], content["model"]
    classes = [(entry["protocol"], entry["setting"], *entry["auroc_per_class"].values()) for entry in content["results"]]
    header = ("protocol", "training", *content["results"][0]["auroc_per_class"])
    notes = [*content["notes"], *dict.fromkeys(note for entry in content["results"] for note in entry["notes"])]

    def shown(name: str) -> list[Markup]:
        confusion = "Cases by true and predicted class, over all runs."
        return [html.figure(one, _CAPTIONS.get(key, confusion)) for key, one in drawn.items() if key.startswith(name)]

    sections = [
        html.Section(
            "Results",
            html.join(
                html.text(f"Mean ± deviation over runs {INTERVAL}; of each column the best in bold."),
                compact.html(UNDEFINED),
                html.details("every metric", table.html(UNDEFINED)),
            ),
        ),
        html.Section(
            "AUROC of each class",
            html.join(html.table(header, classes, "a test part held only one kind of the class"), html.columns(*shown("roc"))),
        ),
        html.Section("Cases and calibration", html.columns(_every_case(runs), *shown("calibration"))),
        *([html.Section("Confusion", html.columns(*shown("confusion")))] if data["task"] != "multilabel" else []),
        *([html.Section("Misclassified cases", html.join(*shown("misclassified")))] if "misclassified" in drawn else []),
        *([html.Section("Notes", html.join(*(html.text(note, "note") for note in notes)))] if notes else []),
        html.Section("What was measured", html.key_values(_measured(content))),
    ]
    lead = f"Classification ({data['task']}): {data['cases']} cases of {data['patients']} patients; {len(runs)} trainings."
    return html.page(f"{model['name']} on {data['name']}", lead, sections)


def _measured(content: dict[str, Any]) -> dict[str, Any]:
    data, model = content["data"], content["model"]
    splits = {f"split {number}": origin for number, origin in enumerate(content["splits"])}
    same = len(set(content["splits"])) == 1
    return {
        "model": model["name"],
        "model hash": model["hash"],
        "data": f"{data['name']}: {data['cases']} cases, {data['patients']} patients",
        "data hash": data["hash"],
        "licence of the data": data["licence"],
        **({f"splits (all {len(splits)})": content["splits"][0]} if same and len(splits) > 1 else splits),
        "version": content["meddino_version"],
    }


def _every_case(runs: Sequence[Run]) -> Markup:
    """Draw the probability of each test case's truth, a dot a protocol."""
    caption = "Probability that each test case's true label was given, mean over runs; the best on top"
    protocols = dict.fromkeys(run.protocol for run in runs)
    values = {protocol: truth_by_case([run for run in runs if run.protocol == protocol]) for protocol in protocols}
    known = {protocol: own for protocol, own in values.items() if own}
    return html.figure(case_plot(known, "every test case", "probability of the truth"), caption) if known else Markup("")


def truth_by_case(runs: Sequence[Run]) -> dict[str, float]:
    """Return the probability that each case's true label was given, mean over labels that are known and over runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for place, case in enumerate(run.ids):
            given = run.probabilities[place]
            if run.truth.ndim == 2:
                known = run.truth[place] != -1
                right = np.where(run.truth[place] == 1, given, 1 - given)[known]
            else:
                right = given[[run.truth[place]]]
            if len(right):
                found.setdefault(case, []).append(float(right.mean()))
    return {case: float(np.mean(values)) for case, values in found.items()}
