"""One slice as it lies in a shard: `<key>.b2` (or `<key>.png`) and `<key>.json`. Writer and reader share this file."""

import io
from dataclasses import dataclass
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.core.errors import ShardError
from meddino.core.files import canonical_json
from meddino.data.intensity import Modality

Codec = Literal["blosc2", "png16"]
SUFFIXES: dict[Codec, str] = {"blosc2": "b2", "png16": "png"}
DTYPES = ("int16", "uint8", "uint16", "float32")  # of stored values
MAX_SLICE_PIXELS = 16384 * 16384
_MAX_BLOCK_PIXELS = 4096 * 4096
_PNG_OFFSET = 32768  # PNG has no signed 16 bits


@dataclass(frozen=True)
class SliceInfo:
    """What is known of a slice; the content of `<key>.json`.

    Attributes:
        volume_id: Salted hash that names the volume.
        z_index: Number of the slice in the canonical volume, counted from the feet.
        z_mm: Position along the volume's axis, from its first slice; None where there is none.
        spacing_mm: [y, x] between pixel centres; None where nothing says it.
        thickness_mm: Distance to the next slice, or None.
        dataset: Name of the source in the curation config.
        codec: How the pixels are stored.
        modality: What the values mean.
    """

    volume_id: str
    z_index: int
    z_mm: float | None
    spacing_mm: tuple[float, float] | None
    thickness_mm: float | None
    dataset: str
    codec: Codec
    modality: Modality = "ct"

    def to_json(self) -> bytes:
        """Return canonical JSON bytes."""
        return canonical_json(vars(self)).encode()


def encode_slice(values: NDArray[Any], codec: Codec = "blosc2", level: int = 5) -> bytes:
    """Compress one slice without loss.

    Args:
        values: [rows, cols], or [rows, cols, 3] of a colour picture; of CT int16 in Hounsfield units.
        codec: "blosc2" (zstd with bitshuffle), or for int16 "png16" (values + 32768 as unsigned 16 bits).
        level: Compression level of the codec, 1 (fast) to 9 (small).
    """
    grey = values.ndim == 2
    if str(values.dtype) not in DTYPES or not (grey or (values.ndim == 3 and values.shape[2] == 3)):
        raise ValueError(f"a slice is {' or '.join(DTYPES)} [rows, cols] or [rows, cols, 3], not {values.dtype} {values.shape}")
    contiguous = np.ascontiguousarray(values)
    if codec == "png16":
        if values.dtype != np.int16 or not grey:
            raise ValueError(f"png16 holds int16 [rows, cols], not {values.dtype} {values.shape}; store it with blosc2")
        stream = io.BytesIO()
        Image.fromarray((contiguous.astype(np.int32) + _PNG_OFFSET).astype(np.uint16)).save(stream, "PNG", compress_level=level)
        return stream.getvalue()
    # One block a frame: left to itself, Blosc2 cuts blocks by the processor's cache, so another machine would write other
    # bytes (and larger ones, which decode slower). One thread: decoding a slice is one call.
    rows, cols, *channels = contiguous.shape
    blocks = (max(1, min(rows, _MAX_BLOCK_PIXELS // max(1, cols))), min(cols, _MAX_BLOCK_PIXELS), *channels)
    array = blosc2.asarray(
        contiguous,
        chunks=contiguous.shape,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": level, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
    )
    return bytes(array.to_cframe())


def decode_slice(
    data: bytes, codec: Codec, rows: int, cols: int, where: str, dtype: str = "int16", channels: int = 1
) -> NDArray[Any]:
    """Decompress one slice.

    Args:
        data: Bytes of the shard member.
        codec: As recorded for the sample.
        rows: Expected number of rows, from the index.
        cols: Expected number of columns.
        where: Names the sample in an error.
        dtype: Expected type of the values.
        channels: Expected number of values a pixel.

    Returns:
        Stored values [rows, cols], or [rows, cols, channels] where there is more than one.

    Raises:
        ShardError: The bytes are damaged, or hold another size or type than the index says.
    """
    shape = (rows, cols) if channels == 1 else (rows, cols, channels)
    if rows * cols * channels > MAX_SLICE_PIXELS:
        raise ShardError(f"{where}: {rows} x {cols} pixels; at most {MAX_SLICE_PIXELS} are allowed")
    try:
        if codec == "png16":
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.size != (cols, rows):
                    raise ShardError(f"{where}: holds {image.size[1]} x {image.size[0]} pixels, the index says {rows} x {cols}")
                return (np.asarray(image).astype(np.int32) - _PNG_OFFSET).astype(np.int16)
        # The frame's own header says its shape: checked before anything is decompressed.
        array = blosc2.ndarray_from_cframe(data)
        if array.shape != shape or str(array.dtype) != dtype:
            raise ShardError(f"{where}: holds {array.dtype} {list(array.shape)}, the index says {dtype} {list(shape)}")
        return np.asarray(array[:])
    except (RuntimeError, ValueError, TypeError, OSError, SyntaxError, MemoryError) as error:
        raise ShardError(f"{where}: damaged slice data ({error})") from error
