"""Figures for papers: ROC curves, confusion matrices, calibration, forest plots; saved as PDF, SVG or PNG without a date."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.files import atomic_write
from meddino.core.html_charts import new_figure
from meddino_evaluation.metrics.classification import UNKNOWN, Probabilities, Truth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
Outcome = tuple[Truth, Probabilities]
"""Truth and probabilities of the test cases of one run; see `metrics.classification`."""
_BINS = 10
_DPI = 200


def add_figures_argument(parser: argparse.ArgumentParser) -> None:
    """Add --figures."""
    parser.add_argument("--figures", choices=FORMATS, help="also write every figure as a file of this kind, under OUT/figures")


def save_figures(figures: Mapping[str, "Figure"], folder: Path, kind: str) -> None:
    """Write figures as files named after their keys; equal figures give equal bytes."""
    from matplotlib import rc_context

    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    for name, drawing in figures.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.{kind}"
        with atomic_write(path) as stream, rc_context({"svg.hashsalt": name}):
            drawing.savefig(stream, format=kind, dpi=_DPI, bbox_inches="tight", metadata=dated[kind])


def mean_roc(runs: Sequence[Outcome]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the false and true positive rates of the mean ROC curve: over runs and, one against the rest, over classes.

    Args:
        runs: Classes without both positives and negatives in a run are left out of it.

    Returns:
        101 rates from 0 to 1, and the mean sensitivity at each; NaN if no class can be drawn.
    """
    from sklearn.metrics import roc_curve

    rates, curves = np.linspace(0, 1, 101), []
    for truth, probabilities in runs:
        several, binary = truth.ndim == 2, probabilities.shape[1] == 2 and truth.ndim == 1
        for number in range(1 if binary else 0, probabilities.shape[1]):
            known = truth[:, number] != UNKNOWN if several else np.ones(len(truth), dtype=bool)
            positive = truth[known, number] == 1 if several else truth == number
            if positive.any() and not positive.all():
                false, true, _ = roc_curve(positive, probabilities[known, number])
                curves.append(np.interp(rates, false, true))
                curves[-1][0] = 0.0
    return rates, np.mean(curves, axis=0) if curves else np.full(len(rates), math.nan)


def roc_figure(runs: Mapping[str, Sequence[Outcome]], auroc: Mapping[str, float | None]) -> "Figure":
    """Draw the mean ROC curve of each protocol.

    Args:
        runs: By protocol.
        auroc: What the tables say, for the legend.
    """
    drawing, axes = new_figure(4.2, 3.8)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for name, own in runs.items():
        value = auroc.get(name)
        axes.plot(*mean_roc(own), linewidth=1.3, label=name if value is None else f"{name}, AUROC {value:.3f}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    return _finished(drawing, axes)


def confusion_figure(runs: Sequence[Outcome], classes: Sequence[str], title: str) -> "Figure":
    """Draw how often cases of each class (rows) were taken for each class: share of the row, and cases over all runs."""
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for truth, probabilities in runs:
        np.add.at(counts, (truth, probabilities.argmax(1)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.6 + 0.75 * len(classes)
    drawing, axes = new_figure(side + 0.6, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, col in np.ndindex(*counts.shape):
        colour = "white" if shares[row, col] > 0.55 else "black"
        axes.text(col, row, f"{shares[row, col]:.2f}\n({counts[row, col]})", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=10)
    return drawing


def reliability_figure(runs: Mapping[str, Sequence[Outcome]]) -> "Figure":
    """Draw how often a prediction is right over how sure it is, for each protocol (all its runs together)."""
    drawing, axes = new_figure(4.2, 3.6)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for name, own in runs.items():
        confidence, right = (np.concatenate(parts) for parts in zip(*(_confidence(*one) for one in own), strict=True))
        number = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        filled = [one for one in range(_BINS) if (number == one).any()]
        x = [float(confidence[number == one].mean()) for one in filled]
        y = [float(right[number == one].mean()) for one in filled]
        axes.plot(x, y, marker="o", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    return _finished(drawing, axes)


def forest_figure(rows: Sequence[tuple[str, float, float, float]], x_label: str) -> "Figure":
    """Draw differences with their intervals, one row each, around the line of no difference.

    Args:
        rows: (name, difference, lower end, upper end); ends that are NaN are not drawn.
        x_label: What the difference is of.
    """
    drawing, axes = new_figure(5.4, 0.9 + 0.32 * len(rows))
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, (_, difference, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color="#1f4e79", linewidth=1.2)
        axes.plot([difference], [place], "s", color="#1f4e79", markersize=5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", alpha=0.25)
    return drawing


def _confidence(truth: Truth, probabilities: Probabilities) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    if truth.ndim == 2:
        known = truth != UNKNOWN
        return probabilities[known], truth[known] == 1
    return probabilities.max(1), probabilities.argmax(1) == truth


def _finished(drawing: "Figure", axes: Any) -> "Figure":
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return drawing
