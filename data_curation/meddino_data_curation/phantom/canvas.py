"""A grid in patient millimetres that shapes are painted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Inside = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Voxel centres in patient millimetres.

    Attributes:
        z: [Z, 1, 1], to the head; 0 is the top of the right half of the diaphragm.
        y: [1, Y, 1], to the back; 0 is the middle of the trunk.
        x: [1, 1, X], to the patient's left; 0 is the spine.
    """

    z: Field
    y: Field
    x: Field

    @classmethod
    def regular(
        cls, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], first_mm: tuple[float, float, float]
    ) -> "Grid":
        """Return a grid from array shape, spacing and the position of its first voxel, all [Z, Y, X]."""
        z, y, x = (
            (first + step * np.arange(size)).astype(np.float32)
            for size, step, first in zip(shape, spacing_mm, first_mm, strict=True)
        )
        return cls(z[:, None, None], y[None, :, None], x[None, None, :])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis [Z, Y, X]."""
        return self.z.shape[0], self.y.shape[1], self.x.shape[2]

    def ellipsoid(
        self, centre_mm: Sequence[float], radii_mm: Sequence[float], turn_deg: Sequence[float] = (0.0, 0.0, 0.0)
    ) -> Field:
        """Return the squared normalised distance from an ellipsoid's centre: 1 on its surface.

        Args:
            centre_mm: x, y, z of the centre.
            radii_mm: Radii along the ellipsoid's own x, y, z.
            turn_deg: Rotations about x, then y, then z.
        """
        offsets = [axis - np.float32(centre) for axis, centre in zip((self.x, self.y, self.z), centre_mm, strict=True)]
        to_own = _rotation(turn_deg).T / np.asarray(radii_mm, dtype=np.float64)[:, None]
        total: Field = np.zeros(self.shape, dtype=np.float32)
        for row in to_own.astype(np.float32):
            own = row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2]
            total += own * own
        return total

    def tube(self, x_mm: float | Reals, y_mm: float | Reals, radius_mm: float | Reals) -> Field:
        """Return the squared normalised distance from an upright tube whose centre may depend on z."""
        value = ((self.x - x_mm) ** 2 + (self.y - y_mm) ** 2) / np.square(radius_mm)
        return np.broadcast_to(value.astype(np.float32), self.shape)

    def smooth_noise(self, rng: np.random.Generator, scale_mm: float) -> Field:
        """Return noise of mean 0 and standard deviation about 1 that varies over `scale_mm` (cubic B-splines)."""
        taps = []
        for axis in (self.z, self.y, self.x):
            place = (axis.reshape(-1) - axis.min()) / np.float32(scale_mm)
            first = np.floor(place).astype(np.intp)
            taps.append((first, _bspline(place - first)))
        coarse = rng.standard_normal(tuple(int(first.max()) + 4 for first, _ in taps)).astype(np.float32)
        for number, (first, weights) in enumerate(taps):
            moved = np.moveaxis(coarse, number, -1)
            blended = moved[..., first] * weights[0]
            for tap in range(1, 4):
                blended = blended + moved[..., first + tap] * weights[tap]
            coarse = np.moveaxis(blended, -1, number)
        # Cubic B-spline weights of unit noise have a variance of 0.479 along each axis, averaged over a cell.
        return np.ascontiguousarray(coarse / np.float32(0.479**1.5), dtype=np.float32)


def _rotation(turn_deg: Sequence[float]) -> NDArray[np.float64]:
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    turned: NDArray[np.float64] = about_z @ about_y @ about_x
    return turned


def _bspline(fraction: Reals) -> list[Field]:
    t = fraction
    weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
    return [weight.astype(np.float32) for weight in weights]


class Canvas:
    """Hounsfield units and labels that are painted over one another.

    Attributes:
        grid: Where the voxels are.
        hu: float32 [Z, Y, X].
        labels: uint8 [Z, Y, X].
    """

    def __init__(self, grid: Grid, background_hu: float = -1000.0) -> None:
        self.grid = grid
        self.hu: Field = np.full(grid.shape, background_hu, dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(grid.shape, dtype=np.uint8)

    def paint(self, inside: Inside, hu: float | Reals, label: int = 0) -> None:
        """Set the values and the label of the voxels inside a shape.

        Args:
            inside: bool [Z, Y, X] or broadcastable to it.
            hu: One value, or [Z, Y, X].
            label: Number in the segmentation; 0 is background.
        """
        np.copyto(self.hu, np.asarray(hu, dtype=np.float32), where=inside)
        np.copyto(self.labels, np.uint8(label), where=inside)
