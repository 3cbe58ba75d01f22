"""Metrics of one case: one row a label.

The rule for an empty label: where neither the reference nor the prediction has it, every metric is undefined (NaN) and
the row is left out of means (nnU-Net's rule; 1 would reward data sets for what they lack). Where exactly one has it, Dice,
IoU and NSD are 0 and the distances are undefined: there is no surface to measure to. Means say how many rows they hold.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.data.labels import IGNORED, LabelScheme
from meddino_evaluation.metrics.statistics import NOT_NEGATIVE, SHARE, UNBOUNDED, Span
from meddino_evaluation.metrics.surfaces import assd_mm, border_distances, hd95_mm, surface_dice


@dataclass(frozen=True)
class LabelRow:
    """One line of cases.csv.

    Attributes:
        case: Case identifier.
        label: Name of the label.
        dice: 2 |A and B| / (|A| + |B|).
        iou: |A and B| / |A or B|.
        nsd: Normalised surface Dice at the stated tolerance.
        hd95_mm: 95th percentile Hausdorff distance.
        assd_mm: Average symmetric surface distance.
        volume_ml_pred: Volume of the prediction.
        volume_ml_ref: Volume of the reference.
        volume_difference_ml: Prediction minus reference; undefined where both are empty.
    """

    case: str
    label: str
    dice: float
    iou: float
    nsd: float
    hd95_mm: float
    assd_mm: float
    volume_ml_pred: float
    volume_ml_ref: float
    volume_difference_ml: float

    def values(self) -> dict[str, Any]:
        """Return the row as a dict."""
        return asdict(self)


METRICS = tuple(field.name for field in fields(LabelRow))[2:]
"""Columns of cases.csv after case and label."""

TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "nsd": "NSD",
    "hd95_mm": "HD95 [mm]",
    "assd_mm": "ASSD [mm]",
    "volume_difference_ml": "volume difference [ml]",
    "volume_error_ml": "volume error [ml]",
    "hd95_px": "HD95 [px]",
    "assd_px": "ASSD [px]",
    "area_difference_px": "area difference [px]",
    "area_error_px": "area error [px]",
}
"""What is averaged over cases, by its title; of pictures in pixels. An error is a difference without its sign: signs cancel."""

AVERAGED: dict[str, Span] = {
    "dice": SHARE,
    "iou": SHARE,
    "nsd": SHARE,
    "hd95_mm": NOT_NEGATIVE,
    "assd_mm": NOT_NEGATIVE,
    "volume_difference_ml": UNBOUNDED,
    "volume_error_ml": NOT_NEGATIVE,
}
"""What is averaged and what its values can be, before `tables.in_pixels` gives the names of pictures."""


def score_case(
    case: str,
    pred: NDArray[Any],
    ref: NDArray[np.int32],
    labels: LabelScheme,
    spacing_mm: tuple[float, ...],
    tolerance_mm: float,
    surface: bool = True,
    flat: bool = False,
) -> list[LabelRow]:
    """Measure every label of a case.

    Args:
        case: Its identifier.
        pred: [Z, Y, X] label values.
        ref: [Z, Y, X] label values; voxels that are `IGNORED` count for nothing.
        labels: Which values make up which label.
        spacing_mm: Along Z, Y, X.
        tolerance_mm: Of the normalised surface Dice.
        surface: Whether to measure surfaces.
        flat: The case is a picture: its only slice is measured in two dimensions.
    """
    if flat:
        pred, ref, spacing_mm = pred[0], ref[0], spacing_mm[1:]
    counted = ref != IGNORED
    everything = counted.all()
    rows = []
    for target, name in enumerate(labels.names):
        first, second = labels.mask(pred, target), labels.mask(ref, target)
        if not everything:
            first, second = first & counted, second & counted
        values = mask_metrics(first, second, spacing_mm, tolerance_mm, surface)
        rows.append(LabelRow(case, name, **values))
    return rows


def mask_metrics(
    pred: NDArray[np.bool_],
    ref: NDArray[np.bool_],
    spacing_mm: tuple[float, ...],
    tolerance_mm: float,
    surface: bool = True,
) -> dict[str, float]:
    """Measure one mask against another; see the module for empty ones.

    Args:
        pred: [Z, Y, X], or [Y, X] of a picture.
        ref: Reference, of pred's shape.
        spacing_mm: Along each axis.
        tolerance_mm: Of the normalised surface Dice.
        surface: Whether to measure surfaces; if not they are NaN.
    """
    box = _box(pred, ref)
    pred, ref = pred[box], ref[box]
    size_pred, size_ref = int(np.count_nonzero(pred)), int(np.count_nonzero(ref))
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    values = dict.fromkeys(METRICS, math.nan) | {"volume_ml_pred": size_pred * voxel_ml, "volume_ml_ref": size_ref * voxel_ml}
    if size_pred + size_ref == 0:
        return values
    values["volume_difference_ml"] = (size_pred - size_ref) * voxel_ml
    overlap = int(np.count_nonzero(pred & ref))
    values["dice"] = 2 * overlap / (size_pred + size_ref)
    values["iou"] = overlap / (size_pred + size_ref - overlap)
    if not surface:
        return values
    if size_pred == 0 or size_ref == 0:
        values["nsd"] = 0.0
        return values
    to_ref, to_pred = border_distances(pred, ref, spacing_mm)
    values["hd95_mm"], values["assd_mm"] = hd95_mm(to_ref, to_pred), assd_mm(to_ref, to_pred)
    values["nsd"] = surface_dice(pred, ref, spacing_mm, tolerance_mm)
    return values


def mean_over_cases(rows: Sequence[dict[str, Any]], metric: str) -> tuple[float, int]:
    """Average a metric over a case's labels, then over cases; undefined values are left out.

    Returns:
        The mean (NaN if nothing is defined) and the number of cases in it.
    """
    means = case_means(rows, metric)
    return (float(np.mean(list(means.values()))), len(means)) if means else (math.nan, 0)


def case_means(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    """Average a metric over the labels of each case; a case in which nothing is defined is absent."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if math.isfinite(row[metric]):
            found.setdefault(str(row["case"]), []).append(float(row[metric]))
    return {case: float(np.mean(values)) for case, values in found.items()}


def pooled_overlap(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return Dice and IoU over the voxels of all rows together: large cases count more, so it stands only beside the means.

    Each row's overlap follows from its Dice and its two volumes, so the figures can be recomputed from cases.csv.
    """
    defined = [row for row in rows if math.isfinite(row["dice"])]
    both = sum(row["volume_ml_pred"] + row["volume_ml_ref"] for row in defined)
    twice_the_overlap = sum(row["dice"] * (row["volume_ml_pred"] + row["volume_ml_ref"]) for row in defined)
    if not both:
        return {"dice": math.nan, "iou": math.nan}
    return {"dice": twice_the_overlap / both, "iou": twice_the_overlap / (2 * both - twice_the_overlap)}


def _box(pred: NDArray[np.bool_], ref: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the smallest box that holds both masks; surfaces need not look outside it."""
    either = pred | ref
    box = []
    for axis in range(either.ndim):
        others = tuple(other for other in range(either.ndim) if other != axis)
        places = np.flatnonzero(either.any(axis=others))
        box.append(slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0))
    return tuple(box)
