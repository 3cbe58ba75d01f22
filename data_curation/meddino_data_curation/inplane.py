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
        rows, cols = (max(1, round(size * step / config.spacing_mm)) for size, step in zip(hu.shape, spacing_mm, strict=True))
        hu, spacing_mm = _resized(hu, (rows, cols), spacing_mm)
    if config.size_px is not None:
        hu, spacing_mm = _resized(hu, (config.size_px, config.size_px), spacing_mm)
    return hu, spacing_mm


def _resized(
    hu: NDArray[np.int16], shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> tuple[NDArray[np.int16], tuple[float, float]]:
    if shape == hu.shape:
        return hu, spacing_mm
    picture = Image.fromarray(hu.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    resized = np.clip(np.rint(np.asarray(picture)), _INT16.min, _INT16.max).astype(np.int16)
    extent = hu.shape[0] * spacing_mm[0], hu.shape[1] * spacing_mm[1]
    return resized, (extent[0] / shape[0], extent[1] / shape[1])
