"""One slice as it lies in a shard: `<key>.hu.b2` (or `<key>.hu.png`) and `<key>.json`. Writer and reader share this file."""

import io
import json
from dataclasses import dataclass, fields
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.core.errors import ShardError
from meddino.core.files import canonical_json

Codec = Literal["blosc2", "png16"]
SUFFIXES: dict[Codec, str] = {"blosc2": "hu.b2", "png16": "hu.png"}
MAX_SLICE_PIXELS = 16384 * 16384
_MAX_BLOCK_PIXELS = 4096 * 4096
_PNG_OFFSET = 32768  # PNG has no signed 16 bits


@dataclass(frozen=True)
class SliceInfo:
    """What is known of a slice; the content of `<key>.json`.

    Attributes:
        volume_id: Salted hash that names the volume.
        z_index: Number of the slice in the canonical volume, counted from the feet.
        z_mm: Position along the volume's axis, from its first slice.
        spacing_mm: [y, x] between pixel centres.
        thickness_mm: Distance to the next slice.
        dataset: Name of the source in the curation config.
        codec: How the pixels are stored.
    """

    volume_id: str
    z_index: int
    z_mm: float
    spacing_mm: tuple[float, float]
    thickness_mm: float
    dataset: str
    codec: Codec

    def to_json(self) -> bytes:
        """Return canonical JSON bytes."""
        return canonical_json(vars(self)).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "SliceInfo":
        """Read `<key>.json`.

        Raises:
            ShardError: It is no JSON or lacks a field.
        """
        try:
            values: dict[str, Any] = json.loads(data)
            values["spacing_mm"] = tuple(values["spacing_mm"])
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{where}: not the description of a slice ({error})") from error


def encode_slice(hu: NDArray[np.int16], codec: Codec = "blosc2", level: int = 5) -> bytes:
    """Compress one slice without loss.

    Args:
        hu: [rows, cols] in Hounsfield units.
        codec: "blosc2" (zstd with bitshuffle) or "png16" (HU + 32768 as unsigned 16 bits).
        level: Compression level of the codec, 1 (fast) to 9 (small).
    """
    if hu.dtype != np.int16 or hu.ndim != 2:
        raise ValueError(f"a slice is int16 [rows, cols], not {hu.dtype} {list(hu.shape)}")
    contiguous = np.ascontiguousarray(hu)
    if codec == "png16":
        stream = io.BytesIO()
        Image.fromarray((contiguous.astype(np.int32) + _PNG_OFFSET).astype(np.uint16)).save(stream, "PNG", compress_level=level)
        return stream.getvalue()
    # One block a frame: left to itself, Blosc2 cuts blocks by the processor's cache, so another machine would write other
    # bytes (and larger ones, which decode slower). One thread: decoding a slice is one call.
    rows, cols = contiguous.shape
    blocks = (max(1, min(rows, _MAX_BLOCK_PIXELS // max(1, cols))), min(cols, _MAX_BLOCK_PIXELS))
    array = blosc2.asarray(
        contiguous,
        chunks=contiguous.shape,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": level, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
    )
    return bytes(array.to_cframe())


def decode_slice(data: bytes, codec: Codec, rows: int, cols: int, where: str) -> NDArray[np.int16]:
    """Decompress one slice.

    Args:
        data: Bytes of the shard member.
        codec: As recorded for the sample.
        rows: Expected number of rows, from the index.
        cols: Expected number of columns.
        where: Names the sample in an error.

    Returns:
        int16 [rows, cols] in Hounsfield units.

    Raises:
        ShardError: The bytes are damaged, or hold another size or type than the index says.
    """
    if rows * cols > MAX_SLICE_PIXELS:
        raise ShardError(f"{where}: {rows} x {cols} pixels; at most {MAX_SLICE_PIXELS} are allowed")
    try:
        if codec == "png16":
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.size != (cols, rows):
                    raise ShardError(f"{where}: holds {image.size[1]} x {image.size[0]} pixels, the index says {rows} x {cols}")
                return (np.asarray(image).astype(np.int32) - _PNG_OFFSET).astype(np.int16)
        # The frame's own header says its shape: checked before anything is decompressed.
        array = blosc2.ndarray_from_cframe(data)
        if array.shape != (rows, cols) or array.dtype != np.int16:
            raise ShardError(f"{where}: holds {array.dtype} {list(array.shape)}, the index says int16 [{rows}, {cols}]")
        return np.asarray(array[:], dtype=np.int16)
    except (RuntimeError, ValueError, TypeError, OSError, SyntaxError, MemoryError) as error:
        raise ShardError(f"{where}: damaged slice data ({error})") from error
