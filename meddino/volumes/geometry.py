"""Where voxels lie in the patient. The one place where ITK's x, y, z order is turned round into array order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """The grid of a volume, all in array order [Z, Y, X].

    Attributes:
        shape: Voxels along each axis.
        spacing_mm: Distance between voxel centres along each axis.
        origin_mm: Patient position (LPS, x y z) of voxel [0, 0, 0].
        axes: 3 x 3; row i is the unit vector (LPS, x y z) along array axis i.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    axes: NDArray[np.float64]

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4: from array indices (z, y, x, 1) to the patient's position [mm] (LPS, x y z, 1)."""
        matrix = np.eye(4)
        matrix[:3, :3] = (self.axes * np.asarray(self.spacing_mm)[:, None]).T
        matrix[:3, 3] = self.origin_mm
        return matrix

    def matches(self, other: "Geometry", tolerance_mm: float = 1e-2) -> bool:
        """True if both grids have the same voxels at the same places, to within a tolerance at every corner."""
        if self.shape != other.shape:
            return False
        return bool(np.abs(self.corners_mm() - other.corners_mm()).max() <= tolerance_mm)

    def turned(self, order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> "Geometry":
        """Return the grid of an array whose axes were reordered and flipped: the same voxels at the same places.

        Args:
            order: Source axis of each new axis.
            flips: Whether each new axis runs against its source axis.
        """
        shape, spacing = [self.shape[axis] for axis in order], [self.spacing_mm[axis] for axis in order]
        axes = self.axes[list(order)].copy()
        origin = np.asarray(self.origin_mm, dtype=np.float64)
        for axis, flip in enumerate(flips):
            if flip:
                origin = origin + (shape[axis] - 1) * spacing[axis] * axes[axis]
                axes[axis] = -axes[axis]
        x, y, z = origin.tolist()
        return Geometry((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), (x, y, z), axes)

    def corners_mm(self) -> NDArray[np.float64]:
        """[8, 3]: patient positions (LPS, x y z) of the outermost voxels' centres."""
        ends = np.array(np.meshgrid(*[(0, size - 1) for size in self.shape], indexing="ij")).reshape(3, -1).T
        corners: NDArray[np.float64] = np.asarray(self.origin_mm) + (ends * np.asarray(self.spacing_mm)) @ self.axes
        return corners


def geometry_from_xyz(
    size: Sequence[int], spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]
) -> Geometry:
    """Build a geometry from ITK's values (`GetSize`, `GetSpacing`, `GetOrigin`, `GetDirection`), which run x, y, z.

    Args:
        size: Voxels along x, y, z.
        spacing: Millimetres along x, y, z.
        origin: LPS position of the first voxel.
        direction: 9 numbers, row-major; column j is the unit vector of ITK axis j.
    """
    matrix = np.asarray(direction, dtype=np.float64).reshape(3, 3)
    sx, sy, sz = size
    dx, dy, dz = spacing
    ox, oy, oz = origin
    return Geometry((sz, sy, sx), (dz, dy, dx), (ox, oy, oz), matrix.T[::-1].copy())


def geometry_to_xyz(
    geometry: Geometry,
) -> tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, ...]]:
    """Return `(spacing, origin, direction)` as ITK wants them: the inverse of `geometry_from_xyz`."""
    z, y, x = geometry.spacing_mm
    direction = tuple(float(value) for value in geometry.axes[::-1].T.reshape(-1))
    return (x, y, z), geometry.origin_mm, direction
