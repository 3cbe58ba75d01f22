"""Changing the pixel grid of a slice, with smoothing where it shrinks. Values keep their type."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino_data_curation.config import InplaneConfig


def resample_slice(
    stored: NDArray[Any], spacing_mm: tuple[float, float], config: InplaneConfig
) -> tuple[NDArray[Any], tuple[float, float]]:
    """Resample one slice to a spacing, then to a size.

    Args:
        stored: [rows, cols] or [rows, cols, 3].
        spacing_mm: Between rows, between columns.
        config: What is wanted; nothing leaves the slice as it is.

    Returns:
        The slice and its new spacing.

    Source: MedDINOv3 (0.45 mm, then 256 x 256 px; interpolation published nowhere). Linear interpolation whose support grows
    with the step when shrinking (Pillow's), so that fine noise does not fold into coarse pixels.
    """
    if config.spacing_mm is not None:
        shape = shape_at_spacing((stored.shape[0], stored.shape[1]), spacing_mm, config.spacing_mm)
        stored, spacing_mm = _resized(stored, shape, spacing_mm)
    if config.size_px is not None:
        stored, spacing_mm = _resized(stored, (config.size_px, config.size_px), spacing_mm)
    return stored, spacing_mm


def shape_at_spacing(shape: tuple[int, int], spacing_mm: tuple[float, float], wanted_mm: float) -> tuple[int, int]:
    """Return the rows and columns of a slice resampled to a spacing.

    Args:
        shape: Rows, columns.
        spacing_mm: Between rows, between columns.
        wanted_mm: In both directions.
    """
    return max(1, round(shape[0] * spacing_mm[0] / wanted_mm)), max(1, round(shape[1] * spacing_mm[1] / wanted_mm))


def _resized(
    stored: NDArray[Any], shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> tuple[NDArray[Any], tuple[float, float]]:
    if shape == stored.shape[:2]:
        return stored, spacing_mm
    planes = [stored] if stored.ndim == 2 else [stored[..., channel] for channel in range(stored.shape[2])]
    resized = [_plane(plane, shape) for plane in planes]
    extent = stored.shape[0] * spacing_mm[0], stored.shape[1] * spacing_mm[1]
    return resized[0] if stored.ndim == 2 else np.stack(resized, axis=-1), (extent[0] / shape[0], extent[1] / shape[1])


def _plane(stored: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    picture = Image.fromarray(stored.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    resized = np.asarray(picture)
    if stored.dtype.kind == "f":
        return resized
    limits = np.iinfo(stored.dtype)
    whole: NDArray[Any] = np.clip(np.rint(resized), limits.min, limits.max).astype(stored.dtype)
    return whole
