"""Pixels of a DICOM file as they are stored, one frame at a time: before rescale, padding or anything about display.

Uncompressed frames are read here, from the file as mapped into memory: GDCM holds a whole file several times over, has one
rescale for all frames, and turns MONOCHROME1 over. Compressed frames go to GDCM one by one, as a file in memory.
"""

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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

from meddino.volumes.archives import archive_of, file_size, open_file
from meddino.volumes.dicom.elements import NO_DICOM, integer, open_dataset, silent_pydicom
from meddino.volumes.native import file_in_memory, quiet_native, raise_if_memory_ran_out

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
        with open_file(path) as stream, silent_pydicom():
            dataset, content = open_dataset(stream)
            offset = content.tell()
            syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
            count = max(integer(dataset, "NumberOfFrames", 1), 1)
            head = content.read(6)
            if head[:4] != _PIXEL_DATA[syntax == ExplicitVRBigEndian]:
                return None
            # Not by the syntax: private ones, and files that mix both, say otherwise than they are.
            offset += 12 if head[4:] in (b"OW", b"OB") else 8
            if content is stream and archive_of(path) is not None:
                stream.seek(offset)
                offset, content = 0, io.BytesIO(stream.read(min(file_size(path), _most_bytes(dataset, count))))
            held = content if isinstance(content, io.BytesIO) else None
            if syntax in _PLAIN_SYNTAXES:
                return _native(path, held, offset, dataset, syntax, count)
            bits = integer(dataset, "BitsStored")
            return StoredFrames(_compressed(path, held, offset, dataset, count), count, bits)
    except MemoryError:
        raise
    except NO_DICOM:
        return None


def _most_bytes(dataset: Any, count: int) -> int:
    """Return how long the pixels of an honest file are at most, packed frames and their table included."""
    allocated, rows, cols = (integer(dataset, name) for name in ("BitsAllocated", "Rows", "Columns"))
    return count * (rows * cols * allocated // 4 + 1024) + 65536


def _native(path: Path, content: io.BytesIO | None, offset: int, dataset: Any, syntax: str, count: int) -> StoredFrames | None:
    allocated, bits, high = (integer(dataset, name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16, 32) or not 1 <= bits <= high + 1 <= allocated:
        return None
    kind = ("i" if integer(dataset, "PixelRepresentation") else "u") + str(allocated // 8)
    dtype = np.dtype((">" if syntax in _BIG_ENDIAN_PIXELS else "<") + kind)
    shape = (integer(dataset, "Rows"), integer(dataset, "Columns"))
    size = shape[0] * shape[1]
    held = (len(content.getbuffer()) if content is not None else path.stat().st_size) - offset
    whole = min(count, max(held, 0) // (size * dtype.itemsize)) if size else 0

    def read(frame: int) -> NDArray[Any]:
        if frame >= whole:
            raise EOFError
        start = offset + frame * size * dtype.itemsize
        if content is not None:
            raw = np.frombuffer(content.getbuffer(), dtype, size, start)
        else:
            raw = np.fromfile(path, dtype, size, offset=start)
        stored: NDArray[Any] = raw.astype(dtype.newbyteorder("="))
        # Shifted out and back: the sign fills bits above the stored ones, whose content means nothing.
        if bits < allocated:
            stored = (stored << (allocated - 1 - high)) >> (allocated - bits)
        return stored.reshape(shape)

    return StoredFrames(read, count, bits)


def _compressed(path: Path, content: io.BytesIO | None, offset: int, dataset: Any, count: int) -> Callable[[int], NDArray[Any]]:
    """Return what has GDCM decode one frame, as a file of that frame alone and without a rescale."""

    def read(frame: int) -> NDArray[Any]:
        with path.open("rb") if content is None else nullcontext(content) as stream:
            stream.seek(offset)
            data = get_frame(stream, frame, number_of_frames=count)
        item = _frame_file(dataset, data)
        with file_in_memory(lambda stream: item.save_as(stream, enforce_file_format=True)) as name, quiet_native():
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(name)
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
