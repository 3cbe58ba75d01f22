"""The name of a volume's voxels: the same whatever file, data type or orientation they came in."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray


class ContentHash:
    """Hash of a canonical volume's shape and of its stored values, taken slice by slice.

    Args:
        shape: Slices, rows, columns; of colour pictures also channels.
        dtype: Of the stored values; CT is int16 in Hounsfield units.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "int16") -> None:
        named = repr(tuple(int(size) for size in shape)) + ("" if dtype == "int16" else dtype)
        self._type = np.dtype(dtype).newbyteorder("<")
        self._digest = blake3(named.encode())

    def add(self, values: NDArray[Any]) -> None:
        """Take the next slice, [rows, cols], from the feet up."""
        self._digest.update(np.ascontiguousarray(values, dtype=self._type).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits."""
        return self._digest.hexdigest(length=16)


def volume_hash(slices: Iterable[NDArray[Any]], count: int) -> str:
    """Return the hash of a volume.

    Args:
        slices: Stored values, each [rows, cols] or [rows, cols, channels], from the feet up; one at a time is held.
        count: How many, at least one.
    """
    waiting = iter(slices)
    first = next(waiting)
    content = ContentHash((count, *first.shape), str(first.dtype))
    for values in itertools.chain([first], waiting):
        content.add(values)
    return content.hexdigest()


def slice_hash(values: NDArray[Any]) -> str:
    """Return the hash of one slice of stored values: that of a volume of this slice."""
    return volume_hash([values], 1)
