"""Pictures as volumes of one slice: one pixel is one unit long, colours are channels, a mask picture is a label map."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.core.errors import VolumeError
from meddino.core.files import atomic_write
from meddino.volumes.geometry import Geometry
from meddino.volumes.pictures import MAX_PIXELS, PICTURE_ERRORS, WIDE_MODES, as_uint16, read_picture

COLOURS = ("red", "green", "blue")
_MAY_BE_COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "PA")


def picture_geometry(path: Path) -> Geometry:
    """Return the grid of a picture from its header: one slice, pixels of side 1.

    Raises:
        VolumeError: It cannot be read or is too large.
    """
    try:
        with Image.open(path) as picture:
            cols, rows = picture.size
    except (OSError, *PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise VolumeError(f"picture {path} cannot be read: {error}") from error
    if rows * cols > MAX_PIXELS:
        raise VolumeError(f"picture {path} is {cols} x {rows}; at most {MAX_PIXELS} pixels are read")
    return pixel_grid(rows, cols)


def pixel_grid(rows: int, cols: int) -> Geometry:
    """Return the grid of a picture of so many pixels."""
    return Geometry((1, rows, cols), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3)[::-1].copy())


def is_colour(path: Path) -> bool:
    """Tell from the header whether a picture may hold colour."""
    try:
        with Image.open(path) as picture:
            return picture.mode in _MAY_BE_COLOUR
    except (OSError, *PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise VolumeError(f"picture {path} cannot be read: {error}") from error


def read_planes(path: Path, channels: int) -> NDArray[Any]:
    """Read a picture as [C, 1, H, W]; grey is repeated to three channels, colour becomes grey by its mean.

    Raises:
        VolumeError: It cannot be read, or is empty: all its pixels are the same.
    """
    try:
        values = read_picture(path).values[0]
    except (OSError, *PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise VolumeError(f"picture {path} cannot be read: {error}") from error
    if not values.size or values.min() == values.max():
        raise VolumeError(f"picture {path} is empty: every pixel is {values.flat[0] if values.size else 'missing'}")
    narrow = values.dtype == np.uint8
    if len(values) != channels:
        values = np.repeat(values, channels, 0) if len(values) == 1 else np.rint(values.mean(0, keepdims=True))
    planes: NDArray[Any] = values.astype(np.uint8) if narrow else as_uint16(values, str(path))
    return planes[:, None]


def read_mask_picture(path: Path) -> NDArray[np.int32]:
    """Read a mask picture [1, H, W] whose values are label values: grey values, or numbers of a palette's colours.

    Raises:
        VolumeError: It cannot be read, is compressed with loss, or is in colour.
    """
    try:
        with Image.open(path) as picture:
            if picture.format == "JPEG":
                raise VolumeError(
                    f"mask {path} is a JPEG, whose values are not exact; a task's definition may give it a threshold"
                )
            values = np.asarray(picture if picture.mode in ("P", "L", "1", *WIDE_MODES) else picture.convert("RGB"))
    except (OSError, *PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise VolumeError(f"mask {path} cannot be read: {error}") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise VolumeError(f"mask {path} is in colour; write one grey value a label, or one mask a label")
        values = values[..., 0]
    return values.astype(np.int32)[None]


def brightness(path: Path) -> NDArray[np.uint8]:
    """Read a mask picture [H, W] as brightness of 0 to 255, whatever its mode.

    Raises:
        VolumeError: It cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))
    except (OSError, *PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise VolumeError(f"mask {path} cannot be read: {error}") from error


def write_mask_picture(path: Path, values: NDArray[np.int32]) -> None:
    """Write label values [H, W] as a grey PNG of 8 bits, or 16 where they need it."""
    narrow = values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)
    with atomic_write(path) as stream:
        Image.fromarray(narrow).save(stream, "png")
