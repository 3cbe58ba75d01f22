"""What a volume's stored values say of themselves: their range, and the type that a corpus holds. Imports no torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.data.intensity import MEMBERS, RANGE_PERCENTILES, Modality


def value_range(modality: Modality, values: NDArray[Any]) -> tuple[float, float]:
    """Return the stored values that become 0 and 1.

    Args:
        modality: Arbitrary units (MR): the 0.5 and 99.5 percentiles of `values`. Brightness: the stored type's range where it
            is 8 or 16 bits wide, else percentiles as for MR. Hounsfield units: nothing is stretched, so (0, 1).
        values: Of the whole volume.
    """
    units = MEMBERS[modality].units
    if units == "hounsfield":
        return 0.0, 1.0
    if units == "brightness" and values.dtype in (np.uint8, np.uint16):
        return 0.0, float(np.iinfo(values.dtype).max)
    return percentile_range(values)


def percentile_range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentiles; lowest and highest value where the two are one."""
    low, high = (float(end) for end in np.percentile(values, RANGE_PERCENTILES))
    if low == high:  # nearly everything is background: what is left is still shown
        low, high = float(values.min()), float(values.max())
    return low, high


def stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which values that are no CT are stored: their own, or the nearest one that a corpus holds."""
    if dtype in (np.uint8, np.uint16, np.int16):
        return dtype
    return np.dtype(np.int16) if dtype == np.int8 else np.dtype(np.float32)
