"""The name of a volume's voxels: the same whatever file, data type or orientation they came in."""

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray


class ContentHash:
    """Hash of a canonical volume's shape and of its HU as int16, taken slice by slice.

    Args:
        shape: Slices, rows, columns.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._digest = blake3(repr(tuple(int(size) for size in shape)).encode())

    def add(self, hu: NDArray[np.int16]) -> None:
        """Take the next slice, int16 [rows, cols], from the feet up."""
        self._digest.update(np.ascontiguousarray(hu, dtype="<i2").view(np.uint8).data)

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits."""
        return self._digest.hexdigest(length=16)
