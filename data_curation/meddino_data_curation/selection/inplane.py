"""Changing the pixel grid of a slice, with smoothing where it shrinks. HU stay int16 HU."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino_data_curation.config import InplaneConfig

_INT16 = np.iinfo(np.int16)


def resample_slice(
    hu: NDArray[np.int16], spacing_mm: tuple[float, float], config: InplaneConfig
) -> tuple[NDArray[np.int16], tuple[float, float]]:
    """Resample one slice to a spacing, then to a size.

    Args:
        hu: int16 [rows, cols].
        spacing_mm: Between rows, between columns.
        config: What is wanted; nothing leaves the slice as it is.

    Returns:
        The slice and its new spacing.

    Source: MedDINOv3 (0.45 mm, then 256 x 256 px; interpolation published nowhere). Linear interpolation whose support grows
    with the step when shrinking (Pillow's), so that fine noise does not fold into coarse pixels.
    """
    if config.spacing_mm is not None:
        shape = shape_at_spacing((hu.shape[0], hu.shape[1]), spacing_mm, config.spacing_mm)
        hu, spacing_mm = _resized(hu, shape, spacing_mm)
    if config.size_px is not None:
        hu, spacing_mm = _resized(hu, (config.size_px, config.size_px), spacing_mm)
    return hu, spacing_mm


def shape_at_spacing(shape: tuple[int, int], spacing_mm: tuple[float, float], wanted_mm: float) -> tuple[int, int]:
    """Return the rows and columns of a slice resampled to a spacing.

    Args:
        shape: Rows, columns.
        spacing_mm: Between rows, between columns.
        wanted_mm: In both directions.
    """
    return max(1, round(shape[0] * spacing_mm[0] / wanted_mm)), max(1, round(shape[1] * spacing_mm[1] / wanted_mm))


def _resized(
    hu: NDArray[np.int16], shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> tuple[NDArray[np.int16], tuple[float, float]]:
    if shape == hu.shape:
        return hu, spacing_mm
    picture = Image.fromarray(hu.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    resized = np.clip(np.rint(np.asarray(picture)), _INT16.min, _INT16.max).astype(np.int16)
    extent = hu.shape[0] * spacing_mm[0], hu.shape[1] * spacing_mm[1]
    return resized, (extent[0] / shape[0], extent[1] / shape[1])
