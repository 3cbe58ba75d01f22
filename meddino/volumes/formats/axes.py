"""How far the axes that a header states may lie off a right-angled grid."""

import numpy as np
from numpy.typing import NDArray

SAME_PLACE = 0.02
"""Of a voxel, over a whole axis of 100 voxels: less is rounding."""
SAME_SPACING = 1e-3
"""Of a voxel's size: two statements of it that differ by less are the same."""


def right_angled(directions: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Return the nearest right-angled frame.

    Args:
        directions: [3, 3], one unit vector a column.

    Returns:
        Unit columns [3, 3], and by how much the directions were off if it is more than rounding, else "".
    """
    cosines = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosines < 1e-12:
        return directions, ""
    left, _, right = np.linalg.svd(directions)
    if cosines <= SAME_PLACE:
        return left @ right, ""
    return left @ right, f"axes are {np.degrees(np.arcsin(min(1.0, cosines))):.1f} degrees off a right angle"
