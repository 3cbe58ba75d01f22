"""Small pictures of single axial slices for the report, in which small writing and faces cannot be made out."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.volumes.orientation import to_axial_lps
from meddino.volumes.volume import Volume

THUMBNAIL_PX = 112
SLICE_THUMBNAIL_PX = 64  # of refused slices: a million volumes may each have some
WINDOW_HU = (-160.0, 240.0)  # the usual soft-tissue window


def slice_thumbnail(values: NDArray[np.int16], spacing_mm: tuple[float, float], size_px: int = THUMBNAIL_PX) -> str:
    """Return one slice as a PNG in base64.

    Args:
        values: int16 [rows, cols], CT or what is shown as CT's soft tissue.
        spacing_mm: Between rows, between columns.
        size_px: Of the longer side.
    """
    return _encoded(values, spacing_mm, WINDOW_HU, size_px)


def refused_thumbnail(volume: Volume) -> str:
    """Return the middle axial slice of a volume that is not in HU, as a PNG in base64, or "".

    Volumes of whole numbers from 0 to 255 get none: they may be photographs of a screen, with a name on it.

    Args:
        volume: As read.
    """
    if volume.voxels.dtype.kind not in "iuf":
        return ""
    turned, _ = to_axial_lps(volume, max_tilt_deg=180.0)  # axes are only permuted: no voxel is computed
    plane = np.asarray(turned.planes[len(turned.planes) // 2], dtype=np.float32)
    known = plane[np.isfinite(plane)]
    if known.size == 0 or (known.min() >= 0 and known.max() <= 255 and (known == np.rint(known)).all()):
        return ""
    low, high = (float(value) for value in np.percentile(known, (1, 99)))
    spacing = turned.geometry.spacing_mm
    window = (low, max(high, low + 1e-3))
    return _encoded(np.nan_to_num(plane, nan=low, posinf=high, neginf=low), (spacing[1], spacing[2]), window, THUMBNAIL_PX)


def window_picture(plane: NDArray[Any], window: tuple[float, float]) -> Image.Image:
    """Return an 8-bit picture of [rows, cols], black at the window's lower end and white at its upper one."""
    low, high = window
    grey = np.clip((plane.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    return Image.fromarray(grey.astype(np.uint8))


def in_proportion(
    picture: Image.Image, spacing_mm: tuple[float, float], size_px: int, resampling: Image.Resampling
) -> Image.Image:
    """Return a picture with square pixels.

    Args:
        picture: Of one slice.
        spacing_mm: Between rows, between columns.
        size_px: Of the longer side.
        resampling: How pixels are computed.
    """
    height, width = picture.height * spacing_mm[0], picture.width * spacing_mm[1]
    scale = size_px / max(height, width)
    return picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), resampling)


def _encoded(plane: NDArray[Any], spacing_mm: tuple[float, float], window: tuple[float, float], size_px: int) -> str:
    stream = io.BytesIO()
    in_proportion(window_picture(plane, window), spacing_mm, size_px, Image.Resampling.BOX).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
