"""Pixels of a DICOM file as they are stored, one frame at a time: before rescale, padding or anything about display.

Uncompressed frames are read here, from the file as mapped into memory: GDCM holds a whole file several times over, has one
rescale for all frames, and turns MONOCHROME1 over. Compressed frames go to GDCM one by one, as a file in memory.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from meddino.volumes.dicom.elements import NO_DICOM, integer, open_dataset, silent_pydicom
from meddino.volumes.native import quiet_native, raise_if_memory_ran_out

_GE_PRIVATE = "1.2.840.113619.5.2"  # implicit little-endian elements, big-endian pixels
_PLAIN_SYNTAXES = (
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, _GE_PRIVATE,
)  # fmt: skip
_BIG_ENDIAN_PIXELS = (ExplicitVRBigEndian, _GE_PRIVATE)
_PIXEL_DATA = {False: b"\xe0\x7f\x10\x00", True: b"\x7f\xe0\x00\x10"}  # the tag, by whether its own bytes are big-endian
_COPIED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


class StoredFrames:
    """Frames of one file, whole numbers as stored; the pixels stay in the file.

    Args:
        read: Returns one frame, [rows, cols].
        count: Number of frames.
        bits: Of a stored value.
    """

    def __init__(self, read: Callable[[int], NDArray[Any]], count: int, bits: int) -> None:
        self._read, self._count, self.bits = read, count, bits

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._count

    def __getitem__(self, frame: int) -> NDArray[Any] | None:
        """Return one frame, or None if its data are damaged or missing.

        Raises:
            OSError: The system cannot read them.
            MemoryError: There is not enough for it.
        """
        if not 0 <= frame < self._count:
            return None
        try:
            with silent_pydicom():
                return self._read(frame)
        except MemoryError:
            raise
        except RuntimeError as error:
            raise_if_memory_ran_out(error)
            return None
        except NO_DICOM:
            return None


def open_frames(path: Path) -> StoredFrames | None:
    """Open a file's pixels.

    Returns:
        None if it has none, or its header is damaged.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with path.open("rb") as stream, silent_pydicom():
            dataset, content = open_dataset(stream)
            offset = content.tell()
            syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
            count = max(integer(dataset, "NumberOfFrames", 1), 1)
            head = content.read(6)
            if head[:4] != _PIXEL_DATA[syntax == ExplicitVRBigEndian]:
                return None
            # Not by the syntax: private ones, and files that mix both, say otherwise than they are.
            offset += 12 if head[4:] in (b"OW", b"OB") else 8
            if syntax in _PLAIN_SYNTAXES:
                return _native(path, content if content is not stream else None, offset, dataset, syntax, count)
            bits = integer(dataset, "BitsStored")
            return StoredFrames(_compressed(path, offset, dataset, count), count, bits)
    except MemoryError:
        raise
    except NO_DICOM:
        return None


def _native(path: Path, content: IO[bytes] | None, offset: int, dataset: Any, syntax: str, count: int) -> StoredFrames | None:
    allocated, bits, high = (integer(dataset, name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16, 32) or not 1 <= bits <= high + 1 <= allocated:
        return None
    kind = ("i" if integer(dataset, "PixelRepresentation") else "u") + str(allocated // 8)
    dtype = np.dtype((">" if syntax in _BIG_ENDIAN_PIXELS else "<") + kind)
    shape = (integer(dataset, "Rows"), integer(dataset, "Columns"))
    size = shape[0] * shape[1]
    held = (len(content.getbuffer()) if content is not None else path.stat().st_size) - offset  # type: ignore[attr-defined]
    whole = min(count, max(held, 0) // (size * dtype.itemsize)) if size else 0

    def read(frame: int) -> NDArray[Any]:
        if frame >= whole:
            raise EOFError
        start = offset + frame * size * dtype.itemsize
        if content is not None:
            raw = np.frombuffer(content.getbuffer(), dtype, size, start)  # type: ignore[attr-defined]
        else:
            raw = np.fromfile(path, dtype, size, offset=start)
        stored: NDArray[Any] = raw.astype(dtype.newbyteorder("="))
        # Shifted out and back: the sign fills bits above the stored ones, whose content means nothing.
        if bits < allocated:
            stored = (stored << (allocated - 1 - high)) >> (allocated - bits)
        return stored.reshape(shape)

    return StoredFrames(read, count, bits)


def _compressed(path: Path, offset: int, dataset: Any, count: int) -> Callable[[int], NDArray[Any]]:
    """Return what has GDCM decode one frame, as a file of that frame alone and without a rescale."""

    def read(frame: int) -> NDArray[Any]:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = get_frame(stream, frame, number_of_frames=count)
        with _file_in_memory(_frame_file(dataset, data)) as name, quiet_native():
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(name)
            stored: NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
        return stored.reshape(stored.shape[-2:])

    return read


@contextmanager
def _file_in_memory(dataset: pydicom.Dataset) -> Iterator[str]:
    """Give a dataset a path that GDCM can open: no folder for temporary files can be full, or slow."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory(prefix="frame-") as folder:
            dataset.save_as(Path(folder, "frame"), enforce_file_format=True)
            yield str(Path(folder, "frame"))
        return
    with open(os.memfd_create("frame"), "w+b") as stream:  # noqa: PTH123 - a descriptor has no path
        dataset.save_as(stream, enforce_file_format=True)
        stream.flush()
        yield f"/proc/self/fd/{stream.fileno()}"


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
