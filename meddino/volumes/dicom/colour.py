"""Colour pictures in DICOM as RGB: planes, YBR and palettes are undone by pydicom, frame by frame."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.volumes.archives import open_file
from meddino.volumes.dicom.elements import NO_DICOM, integer, open_dataset, silent_pydicom, text

PALETTE = "PALETTE COLOR"
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


@dataclass(frozen=True)
class ColourFrames:
    """Frames in colour.

    Attributes:
        values: [S, H, W, 3], 8 or 16 bits.
        white: What stands for white.
    """

    values: NDArray[Any]
    white: float


def is_colour(dataset: Any) -> bool:
    """Tell by its header whether a picture is in colour; a palette's numbers are no brightness."""
    return integer(dataset, "SamplesPerPixel", 1) != 1 or text(dataset, "PhotometricInterpretation") == PALETTE


def is_readable_colour(dataset: Any) -> bool:
    """Tell by its header whether a picture has one of the kinds of colour that are read."""
    samples, photometric = integer(dataset, "SamplesPerPixel", 1), text(dataset, "PhotometricInterpretation")
    return (samples == 3 and photometric in _COLOURS) or (samples == 1 and photometric == PALETTE)


def read_colour(path: Path, shape: tuple[int, int, int]) -> ColourFrames | None:
    """Read a colour picture.

    Args:
        path: Of the file.
        shape: Frames, rows and columns by its header; within what may be read.

    Returns:
        None where pixels are missing or damaged, of another size than the header says, or packed in a way that is not known.

    Raises:
        OSError: It cannot be read.
        MemoryError: There is not enough for it.
    """
    from pydicom.pixels import iter_pixels

    try:
        with open_file(path) as stream, silent_pydicom():
            dataset, content = open_dataset(stream)
            # Deflated files are inflated as a whole: no colour picture is known to be one.
            if content is not stream or not is_readable_colour(dataset) or integer(dataset, "BitsAllocated") not in (8, 16):
                return None
            frames = []
            for frame in iter_pixels(stream):
                shown = _through_palette(frame, dataset) if text(dataset, "PhotometricInterpretation") == PALETTE else frame
                if shown.shape != (*shape[1:], 3) or shown.dtype not in (np.uint8, np.uint16):
                    return None
                frames.append(shown)
            return ColourFrames(np.stack(frames), _white(dataset)) if len(frames) == shape[0] else None
    except MemoryError:
        raise
    except (RuntimeError, *NO_DICOM):
        return None


def _through_palette(frame: NDArray[Any], dataset: Any) -> NDArray[Any]:
    from pydicom.pixels import apply_color_lut

    colours: NDArray[Any] = apply_color_lut(frame, dataset)
    return colours[..., :3]  # the fourth is opacity


def _white(dataset: Any) -> float:
    is_palette = text(dataset, "PhotometricInterpretation") == PALETTE
    bits = int(dataset.RedPaletteColorLookupTableDescriptor[2]) if is_palette else integer(dataset, "BitsStored")
    return 2.0**bits - 1
