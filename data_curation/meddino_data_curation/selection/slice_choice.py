"""Which slices are worth keeping: those that show something, are whole, and are not nearly the same as the one before."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddino.data.intensity import MEMBERS, Modality
from meddino_data_curation.config import InplaneConfig, SlicesConfig
from meddino_data_curation.selection.inplane import shape_at_spacing

AIR_HU = -1000
_BODY_ABOVE_HU = -350
_BODY_ABOVE = 0.1  # share of the volume's range: noise of the air lies below
_PICTURE_DIFFERS = 0.05  # share of the range by which what is shown differs from the commonest grey
_MASK_PX = 160  # longer side of the grid the body is looked for on
_SAMPLE_PX = 128  # about the longer side of the grid whose pixels stand for the slice's
_FLAT_STEP = 16


@dataclass(frozen=True)
class SliceStatistics:
    """What is measured on every slice.

    Attributes:
        p01: 1st percentile, in stored values: of CT [HU].
        p50: Median.
        p99: 99th percentile.
        body_fraction: Share of pixels inside the body, its air included; of a picture, of what is shown. Writing has strokes
            too thin to count.
        padding_fraction: Share of rows or columns (whichever is larger) that hold one value only.
    """

    p01: float
    p50: float
    p99: float
    body_fraction: float
    padding_fraction: float


def body_mask(hu: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Return where the body is in one slice: the largest dense piece with what it encloses, and pieces of a tenth its size.

    Args:
        hu: int16 [rows, cols].

    Returns:
        bool [rows, cols], found on a coarser grid.
    """
    step = _coarse_step(hu)
    mask = _coarse_body(hu[::step, ::step] > _BODY_ABOVE_HU)
    fine: NDArray[np.bool_] = np.repeat(np.repeat(mask, step, axis=0), step, axis=1)[: hu.shape[0], : hu.shape[1]]
    return fine


def _coarse_step(values: NDArray[Any]) -> int:
    return max(1, -(-int(max(values.shape[:2])) // _MASK_PX))


def _shown(stored: NDArray[Any], modality: Modality, value_range: tuple[float, float] | None) -> NDArray[np.bool_]:
    """Return on a coarse grid which pixels are more than air, darkness or paper."""
    step = _coarse_step(stored)
    coarse = stored[::step, ::step]
    if value_range is None:
        return np.asarray(coarse > _BODY_ABOVE_HU)
    low, high = value_range
    if MEMBERS[modality].units == "arbitrary":
        return np.asarray(coarse > low + _BODY_ABOVE * (high - low))
    unit = (_grey(coarse) - low) / max(high - low, 1e-12)
    counts = np.bincount(np.rint(np.clip(unit, 0, 1) * 63).astype(np.intp).ravel(), minlength=64)
    return np.asarray(np.abs(unit - counts.argmax() / 63) > _PICTURE_DIFFERS)


def _grey(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.ndim == 2 else values.mean(axis=-1, dtype=np.float32)


def _coarse_body(coarse: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the body among the dense pixels of a coarse grid."""
    opened = _opened(coarse) if min(coarse.shape) >= 96 else coarse
    pieces, count = ndimage.label(opened)
    if count == 0:
        return np.zeros_like(coarse)
    sizes = np.bincount(pieces.ravel())[1:]
    return _filled(np.concatenate([[False], sizes >= 0.1 * sizes.max()])[pieces])


def _opened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return SciPy's `binary_opening` with its default cross, in a seventh of its time."""
    eroded = np.zeros_like(mask)
    inner = mask[1:-1, 1:-1]
    eroded[1:-1, 1:-1] = inner & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    opened = eroded.copy()
    opened[1:] |= eroded[:-1]
    opened[:-1] |= eroded[1:]
    opened[:, 1:] |= eroded[:, :-1]
    opened[:, :-1] |= eroded[:, 1:]
    return opened


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return SciPy's `binary_fill_holes`, in a third of its time: what lies outside touches the edge."""
    pieces, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, dtype=bool)
    for edge in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        outside[edge] = True
    outside[0] = False
    filled: NDArray[np.bool_] = ~outside[pieces]
    return filled


def slice_statistics(
    stored: NDArray[Any], modality: Modality = "ct", value_range: tuple[float, float] | None = None
) -> tuple[SliceStatistics, NDArray[Any]]:
    """Measure one slice.

    Args:
        stored: [rows, cols] or [rows, cols, 3].
        modality: What its values mean.
        value_range: Values that become 0 and 1; None for CT.

    Returns:
        The numbers, and the pixels that the percentiles were taken from.
    """
    sample = sorted_sample(stored)
    low, middle, high = sample[np.rint(np.array([0.01, 0.5, 0.99]) * (len(sample) - 1)).astype(np.intp)]
    # Rows of clean air lie around many bodies; only what has no counterpart of noise at all is missing data.
    grey = _grey(stored)
    padding = max(_one_sided(_flat_lines(grey)), _one_sided(_flat_lines(grey.T)))
    body = float(_coarse_body(_shown(stored, modality, value_range)).mean())
    return SliceStatistics(float(low), float(middle), float(high), body, padding), sample


def sorted_sample(stored: NDArray[Any]) -> NDArray[Any]:
    """Return pixels spread evenly over a slice, sorted: of int16 that is a radix sort, faster than np.percentile."""
    step = max(1, max(stored.shape[:2]) // _SAMPLE_PX)
    return np.sort(_grey(stored[::step, ::step]), axis=None, kind="stable")


def _flat_lines(grey: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows hold one value only."""
    flat: NDArray[np.bool_] = (grey[:, ::_FLAT_STEP] == grey[:, :1]).all(axis=1)
    flat[flat] = (grey[flat] == grey[flat, :1]).all(axis=1)  # few are left to be looked at pixel by pixel
    return flat


def _one_sided(flat: NDArray[np.bool_]) -> float:
    """Return the longest run of flat lines that touches an edge, beyond what the opposite edge has too."""
    filled = np.flatnonzero(~flat)
    if len(filled) == 0:
        return 1.0
    before, after = int(filled[0]), int(len(flat) - 1 - filled[-1])
    return abs(before - after) / len(flat)


def refusal(statistics: SliceStatistics, config: SlicesConfig, value_range: tuple[float, float] | None = None) -> str:
    """Return why a slice is left out, or ""; with a range of values where it is no CT."""
    least = config.min_contrast_hu if value_range is None else config.min_contrast * (value_range[1] - value_range[0])
    if statistics.p99 - statistics.p01 < least:
        return "constant"
    if statistics.body_fraction < config.min_body_fraction:
        return "blank"
    if statistics.padding_fraction > config.max_padding_fraction:
        return "truncated"
    return ""


def size_refusal(
    shape: tuple[int, int], spacing_mm: tuple[float, float], config: SlicesConfig, inplane: InplaneConfig | None = None
) -> str:
    """Return why slices of this size are refused, or "".

    Args:
        shape: Rows, columns.
        spacing_mm: Between rows, between columns.
        config: The limits.
        inplane: How slices will be resampled: a spacing that is wrong makes them too large or too small only then.
    """
    y_mm, x_mm = spacing_mm
    field_mm = shape[0] * y_mm, shape[1] * x_mm
    pixels, fields = f"pixels of {y_mm:.3g} x {x_mm:.3g} mm", f"slices of {field_mm[0]:.0f} x {field_mm[1]:.0f} mm"
    reasons = [
        *_too_small_or_large(shape, "", config),
        (min(y_mm, x_mm) < config.min_pixel_mm, f"{pixels}; slices.min_pixel_mm is {config.min_pixel_mm:g}"),
        (max(y_mm, x_mm) > config.max_pixel_mm, f"{pixels}; slices.max_pixel_mm is {config.max_pixel_mm:g}"),
        (
            max(y_mm, x_mm) > config.max_pixel_aspect * min(y_mm, x_mm),
            f"{pixels}; slices.max_pixel_aspect is {config.max_pixel_aspect:g}",
        ),
        (max(field_mm) > config.max_aspect * min(field_mm), f"{fields}; slices.max_aspect is {config.max_aspect:g}"),
    ]
    if inplane is not None and inplane.spacing_mm is not None:
        resampled = shape_at_spacing(shape, spacing_mm, inplane.spacing_mm)
        reasons += _too_small_or_large(resampled, f" at inplane.spacing_mm {inplane.spacing_mm:g}", config)
    return next((reason for applies, reason in reasons if applies), "")


def _too_small_or_large(shape: tuple[int, int], where: str, config: SlicesConfig) -> list[tuple[bool, str]]:
    slices = f"slices of {shape[0]} x {shape[1]} px{where}"
    return [
        (min(shape) < config.min_size_px, f"{slices}; slices.min_size_px is {config.min_size_px}"),
        (max(shape) > config.max_size_px, f"{slices}; slices.max_size_px is {config.max_size_px}"),
    ]


def strided(places_mm: list[float], stride_mm: float) -> set[int]:
    """Return which slices to keep so that kept ones lie at least a distance apart.

    Args:
        places_mm: Position of each slice, rising.
        stride_mm: Least distance; 0 keeps all.
    """
    kept: set[int] = set()
    last = -np.inf
    for index, place in enumerate(places_mm):
        if place - last >= stride_mm - 1e-3:
            kept.add(index)
            last = place
    return kept
