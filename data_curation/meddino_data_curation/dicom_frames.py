"""Frames of an uncompressed multi-frame file, read one at a time: GDCM holds such a file several times over."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from meddino_data_curation.dicom_headers import silent_pydicom

_PLAIN_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_PIXEL_DATA = {False: b"\xe0\x7f\x10\x00", True: b"\x7f\xe0\x00\x10"}  # the tag, by whether high bytes come first


class NativeFrames:
    """Frames in Hounsfield units, each with its own rescale slope and intercept; the pixels stay in the file.

    Args:
        pixels: [frames, rows, cols] as stored, mapped from the file.
        unused_bits: Above the stored ones; their content means nothing.
        scales: (slope, intercept) of every frame.
    """

    def __init__(self, pixels: NDArray[Any], unused_bits: int, scales: list[tuple[float, float]]) -> None:
        self._pixels, self._unused_bits, self._scales = pixels, unused_bits, scales

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._pixels)

    def __getitem__(self, frame: int) -> NDArray[Any]:
        """Return one frame."""
        stored = self._pixels[frame].astype(self._pixels.dtype.newbyteorder("="))
        if self._unused_bits:  # shifted out and back: the sign fills what was unused
            stored = (stored << self._unused_bits) >> self._unused_bits
        slope, intercept = self._scales[frame]
        whole = slope == int(slope) and intercept == int(intercept)
        hu: NDArray[Any] = stored.astype(np.int64 if whole else np.float64)
        hu *= hu.dtype.type(slope)
        hu += hu.dtype.type(intercept)
        return hu


def native_frames(path: Path) -> NativeFrames | None:
    """Open an uncompressed multi-frame file of 16-bit pixels.

    Returns:
        None if it is another kind of file, or shorter than it says.
    """
    with path.open("rb") as stream, silent_pydicom():
        dataset = pydicom.dcmread(stream, stop_before_pixels=True)
        syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
        count, bits = int(dataset.get("NumberOfFrames", 1) or 1), int(dataset.get("BitsStored", 0) or 0)
        layout = (int(dataset.get("BitsAllocated", 0) or 0), int(dataset.get("HighBit", 0) or 0))
        if count < 2 or syntax not in _PLAIN_SYNTAXES or layout != (16, bits - 1) or not 1 <= bits <= 16:
            return None
        swapped = syntax == ExplicitVRBigEndian
        head = 8 if syntax == ImplicitVRLittleEndian else 12
        offset = stream.tell() + head
        if stream.read(4) != _PIXEL_DATA[swapped]:
            return None
    shape = (count, int(dataset.Rows), int(dataset.Columns))
    if path.stat().st_size < offset + 2 * int(np.prod(shape, dtype=object)):
        return None
    kind = "i2" if int(dataset.get("PixelRepresentation", 0) or 0) else "u2"
    pixels = np.memmap(path, (">" if swapped else "<") + kind, "r", offset, shape)
    with silent_pydicom():
        return NativeFrames(pixels, 16 - bits, _scales(dataset, count))


def _scales(dataset: Any, count: int) -> list[tuple[float, float]]:
    shared = _scale(next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None))
    whole = shared or (float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0))
    frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    return [(_scale(frames[index]) if index < len(frames) else None) or whole for index in range(count)]


def _scale(groups: Any) -> tuple[float, float] | None:
    values = groups.get("PixelValueTransformationSequence") if groups is not None else None
    if not values:
        return None
    return float(values[0].get("RescaleSlope", 1) or 1), float(values[0].get("RescaleIntercept", 0) or 0)
