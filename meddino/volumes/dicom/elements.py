"""Elements of DICOM files, read as far as they are needed and never beyond what their file can hold."""

import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.uid import DeflatedExplicitVRLittleEndian

from meddino.volumes.archives import open_file

# pydicom raises each of these for bytes that only look like DICOM at first; a wrong length may ask for all the memory.
NO_DICOM = (
    InvalidDicomError, BytesLengthException, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError,
    RecursionError, MemoryError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
_PIXELS = 0x7FE00000
_FLOAT_PIXELS = {b"\xe0\x7f\x08\x00", b"\x7f\xe0\x00\x08", b"\xe0\x7f\x09\x00", b"\x7f\xe0\x00\x09"}  # float or double
_MOST_DEFLATED_BYTES = 2 << 30
T = TypeVar("T")


def read_elements(path: Path, tags: Sequence[str], use: Callable[[Any], T | None]) -> T | None:
    """Read some elements of a file that stand before its pixels, and use them.

    Where the pixels are floating point numbers, `FloatPixelData` is among the elements, empty.

    Returns:
        None if the file is no DICOM, or its header is damaged.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with silent_pydicom(), open_file(path) as stream:
            return use(_before_pixels(stream, list(tags)))
    except NO_DICOM:
        return None


def open_dataset(stream: IO[bytes]) -> tuple[Any, IO[bytes] | io.BytesIO]:
    """Read all elements before the pixels.

    Args:
        stream: Of the file.

    Returns:
        The dataset with its `file_meta`, and a stream that stands at the pixels: the same one, or, where the file is
        deflated, its inflated content.

    Raises:
        NO_DICOM: It is damaged, or no DICOM.
    """
    inflated = _inflated(stream)
    if inflated is None:
        return pydicom.dcmread(stream, stop_before_pixels=True, force=True), stream
    meta, content = inflated
    dataset = pydicom.Dataset(read_dataset(content, False, True, stop_when=_at_pixels))
    dataset.file_meta = meta
    return dataset, content


def _before_pixels(stream: IO[bytes], tags: list[str]) -> Any:
    inflated = _inflated(stream)
    content: IO[bytes]
    if inflated is None:
        content, dataset = stream, pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags, force=True)
    else:
        meta, content = inflated
        dataset = pydicom.Dataset(read_dataset(content, False, True, stop_when=_at_pixels))
        dataset.file_meta = meta
    if content.read(4) in _FLOAT_PIXELS:
        dataset.FloatPixelData = None  # pixels are not read; that these are no whole numbers has to be known
    return dataset


def _at_pixels(tag: Any, vr: str | None, length: int) -> bool:
    return bool(tag >= _PIXELS)


def _inflated(stream: IO[bytes]) -> tuple[Any, io.BytesIO] | None:
    """Return meta and content of a deflated file, None of another; the stream is left at its beginning."""
    head = stream.read(4096)
    stream.seek(0)
    if head[128:132] != b"DICM" or DeflatedExplicitVRLittleEndian.encode() not in head:
        return None
    stream.seek(132)
    meta = pydicom.dataset.FileMetaDataset(read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2))
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        stream.seek(0)
        return None
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), _MOST_DEFLATED_BYTES)
    return meta, io.BytesIO(content)


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings to itself: they quote the values that they find wrong, names and ids among them."""
    logger = logging.getLogger("pydicom")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def integer(dataset: Any, name: str, default: int = 0) -> int:
    """Return an element's whole number; see `number`."""
    return int(number(dataset, name, default))


def number(dataset: Any, name: str, default: float = 0, most: float = math.inf) -> float:
    """Return an element's number; the default where it is absent, several, none, or larger than it can be.

    What is written into manifests must be a measure: anything else in such an element may be a date or an id.
    """
    try:
        value = float(dataset.get(name))  # pydicom converts on access
    except (TypeError, ValueError, OverflowError, LookupError, BytesLengthException):
        return default
    return value if math.isfinite(value) and abs(value) <= most else default


def text(dataset: Any, name: str) -> str:
    """Return an element's words, several of them with backslashes between; "" where it is absent or cannot be read."""
    try:
        value = dataset.get(name)
    except (TypeError, ValueError, LookupError, BytesLengthException):
        return ""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
