"""Frames of a multi-frame file, read one at a time: GDCM holds such a file several times over, and has one rescale for all."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from meddino.volumes.dicom.headers import silent_pydicom

_PLAIN_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_PIXEL_DATA = {False: b"\xe0\x7f\x10\x00", True: b"\x7f\xe0\x00\x10"}  # the tag, by whether high bytes come first
_ENCAPSULATED_HEAD = 12  # bytes of tag, type and length before the first item
_COPIED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


class Frames:
    """Frames in Hounsfield units, each with its own rescale slope and intercept; the pixels stay in the file.

    Args:
        stored: Returns one frame as stored, [rows, cols].
        scales: (slope, intercept) of every frame.
    """

    def __init__(self, stored: Callable[[int], NDArray[Any]], scales: list[tuple[float, float]]) -> None:
        self._stored, self._scales = stored, scales

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._scales)

    def __getitem__(self, frame: int) -> NDArray[Any]:
        """Return one frame.

        Raises:
            RuntimeError: Its compressed data are damaged.
            ValueError: There are none.
        """
        slope, intercept = self._scales[frame]
        whole = slope == int(slope) and intercept == int(intercept)
        hu: NDArray[Any] = self._stored(frame).astype(np.int64 if whole else np.float64)
        hu *= hu.dtype.type(slope)
        hu += hu.dtype.type(intercept)
        return hu


def open_frames(path: Path) -> Frames | None:
    """Open a multi-frame file.

    Returns:
        None if it is another kind of file, its bits lie in an unusual way, or it is shorter than it says.
    """
    with path.open("rb") as stream, silent_pydicom():
        dataset = pydicom.dcmread(stream, stop_before_pixels=True)
        offset = stream.tell()
        syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
        count = int(dataset.get("NumberOfFrames", 1) or 1)
        if count < 2 or syntax is None or stream.read(4) != _PIXEL_DATA[syntax == ExplicitVRBigEndian]:
            return None
        plain = syntax in _PLAIN_SYNTAXES
        stored = _native(path, offset, dataset, count) if plain else _compressed(path, offset, dataset, count)
        return Frames(stored, _scales(dataset, count)) if stored is not None else None


def _native(path: Path, offset: int, dataset: Any, count: int) -> Callable[[int], NDArray[Any]] | None:
    """Return what reads 16-bit frames from the file as mapped into memory."""
    bits = int(dataset.get("BitsStored", 0) or 0)
    layout = (int(dataset.get("BitsAllocated", 0) or 0), int(dataset.get("HighBit", 0) or 0))
    if layout != (16, bits - 1) or not 1 <= bits <= 16:
        return None
    syntax = dataset.file_meta.TransferSyntaxUID
    offset += 8 if syntax == ImplicitVRLittleEndian else 12
    shape = (count, int(dataset.Rows), int(dataset.Columns))
    if path.stat().st_size < offset + 2 * int(np.prod(shape, dtype=object)):
        return None
    kind = "i2" if int(dataset.get("PixelRepresentation", 0) or 0) else "u2"
    pixels = np.memmap(path, (">" if syntax == ExplicitVRBigEndian else "<") + kind, "r", offset, shape)

    def read(frame: int) -> NDArray[Any]:
        stored: NDArray[Any] = pixels[frame].astype(pixels.dtype.newbyteorder("="))
        # Shifted out and back: the sign fills bits above the stored ones, whose content means nothing.
        return (stored << (16 - bits)) >> (16 - bits) if bits < 16 else stored

    return read


def _compressed(path: Path, offset: int, dataset: Any, count: int) -> Callable[[int], NDArray[Any]]:
    """Return what has GDCM decode one frame, as a file of that frame alone and without a rescale."""

    def read(frame: int) -> NDArray[Any]:
        with path.open("rb") as stream, silent_pydicom(), tempfile.TemporaryDirectory(prefix="frame-") as folder:
            stream.seek(offset + _ENCAPSULATED_HEAD)
            single = Path(folder, "frame")
            _frame_file(dataset, get_frame(stream, frame, number_of_frames=count)).save_as(single, enforce_file_format=True)
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(single))
            stored: NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
            return stored.reshape(stored.shape[-2:])

    return read


def _frame_file(dataset: Any, data: bytes) -> pydicom.Dataset:
    """Return a file of one compressed frame with nothing in it but what decoding needs."""
    item = pydicom.Dataset()
    item.file_meta = pydicom.dataset.FileMetaDataset()
    item.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = CTImageStorage
    item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid()
    for name in _COPIED:
        setattr(item, name, getattr(dataset, name))
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.PixelData = encapsulate([data])
    item["PixelData"].VR = "OB"
    return item


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
