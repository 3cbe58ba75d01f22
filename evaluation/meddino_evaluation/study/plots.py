"""The figures of a study: few-shot curves, metrics with their intervals, differences as a forest plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meddino.core.html_charts import new_figure
from meddino_evaluation.adaptation.few_shot import curve_points
from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.metrics.figures import forest_figure
from meddino_evaluation.study.classification_jobs import FEW_SHOT, StudyKind
from meddino_evaluation.study.config import StudyConfig
from meddino_evaluation.study.paired import Comparison, Found, plot_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forest_plots(comparisons: Sequence[Comparison]) -> dict[str, "Figure"]:
    """Return a forest plot for each data set, by caption."""
    drawn = {}
    for data in dict.fromkeys(one.data for one in comparisons):
        own = [one for one in comparisons if one.data == data]
        rows = [
            (
                f"{one.model} - {one.reference}, {one.protocol}" + ("" if one.setting == "all" else f", {one.setting}"),
                *(one.result.difference, one.result.low, one.result.high),
            )
            for one in own
        ]
        drawn[f"{data}: differences in {own[0].metric} with intervals over patients"] = forest_figure(
            rows, f"difference in {own[0].metric}"
        )
    return drawn


def study_plots(kind: StudyKind, config: StudyConfig, found: Found) -> dict[str, "Figure"]:
    """Return a figure for each data set, by caption: few-shot curves, or metrics with their intervals."""
    plots = {}
    for data in dict.fromkeys(content["data"]["name"] for _, content in found):
        members = [(job, content) for job, content in found if content["data"]["name"] == data]
        metric = plot_metric(config, members[0][1]["data"]["task"])
        if kind == FEW_SHOT:
            plots[f"{data}: {metric} by training patients a class"] = _curves(members, metric, data)
        else:
            plots[f"{data}: {metric} with intervals over patients"] = _intervals(members, metric, data)
    return plots


def has_shares(found: Found) -> bool:
    """Tell whether few-shot results go by the share of training patients, too."""
    return any(entry["setting"].startswith("fraction") for _, content in found for entry in content["results"])


def _curves(members: Found, metric: str, data: str) -> "Figure":
    drawing, axes = new_figure(5.6, 3.6)
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
    axes.set(
        xlabel="training patients a class" + (" (dashed: share of patients)" if has_shares(members) else ""), ylabel=metric
    )
    return _finished(drawing, axes, data)


def _intervals(members: Found, metric: str, data: str) -> "Figure":
    protocols = list(dict.fromkeys(entry["protocol"] for _, content in members for entry in content["results"]))
    models = list(dict.fromkeys(job.model for job, _ in members))
    drawing, axes = new_figure(max(4.5, 1.1 * len(protocols) + 1.5), 3.4)
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


def _finished(drawing: "Figure", axes: Any, title: str) -> "Figure":
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return drawing
