"""Whole numbers plus an intercept, as whole numbers: nothing is clipped, rounded or wrapped round."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = tuple(np.dtype(name) for name in ("i2", "u2", "i4", "u4", "i8", "u8"))
_BEYOND = 2.0**63


def is_whole(intercept: float) -> bool:
    """Tell whether `add_whole` takes an intercept."""
    return intercept.is_integer() and abs(intercept) < _BEYOND


def add_whole(voxels: NDArray[Any], intercept: int, least_bytes: int = 2) -> NDArray[Any]:
    """Add an intercept in the first type, no narrower than the voxels', that holds every sum.

    The values decide, not their type: CT stored as uint16 with -1024 stays in two bytes, as int16.

    Args:
        voxels: Integers in the machine's byte order, of any shape, at least one; changed in place where two types are as wide.
        intercept: Of up to 64 bits.
        least_bytes: Narrower types are not taken.

    Returns:
        The sums; in float64, rounded, only where no integer of 64 bits holds them.
    """
    low, high = int(voxels.min()) + intercept, int(voxels.max()) + intercept
    for kind in _TYPES:
        if kind.itemsize < max(least_bytes, voxels.itemsize) or not np.iinfo(kind).min <= low <= high <= np.iinfo(kind).max:
            continue
        # The intercept itself may lie outside the type: unsigned sums go round its end, and come out right where they fit.
        bits = np.dtype(f"u{kind.itemsize}")
        in_place = voxels.itemsize == kind.itemsize and voxels.flags.writeable
        sums = voxels.view(bits) if in_place else voxels.astype(kind).view(bits)
        sums += bits.type(intercept % 2 ** (8 * kind.itemsize))
        return np.asarray(sums.view(kind))
    return np.asarray(voxels.astype(np.float64) + intercept)
