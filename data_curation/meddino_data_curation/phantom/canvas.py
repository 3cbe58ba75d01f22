"""A grid in patient millimetres that shapes are painted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Inside = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

_AIR_HU = -1000.0
_FAR = 9.0
REACH = 1.7  # times the largest radius: shapes are cut at up to 1.5 of the squared distance, and wobble


@dataclass(frozen=True)
class Grid:
    """Voxel centres in patient millimetres.

    Attributes:
        z: To the head; 0 is the top of the right half of the diaphragm.
        y: To the back; 0 is the middle of the trunk.
        x: To the patient's left; 0 is the spine. All three can be broadcast to [Z, Y, X].
        axes: [Z, 1, 1], [1, Y, 1], [1, 1, X]: the same places in the scanner.
        slack_mm: How far patient and scanner places may lie apart.
    """

    z: Field
    y: Field
    x: Field
    axes: tuple[Field, Field, Field]
    slack_mm: float = 0.0

    @classmethod
    def regular(
        cls, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], first_mm: tuple[float, float, float]
    ) -> "Grid":
        """Return a grid from array shape, spacing and the position of its first voxel, all [Z, Y, X]."""
        z, y, x = (
            (first + step * np.arange(size)).astype(np.float32)
            for size, step, first in zip(shape, spacing_mm, first_mm, strict=True)
        )
        axes = z[:, None, None], y[None, :, None], x[None, None, :]
        return cls(*axes, axes)

    def deformed(self, rng: np.random.Generator, amount_mm: float, scale_mm: float, turn_deg: float) -> "Grid":
        """Return the same voxels of a patient who is turned and differently grown.

        Args:
            rng: Draws the deformation.
            amount_mm: Standard deviation of the displacement along each axis.
            scale_mm: Over which it varies.
            turn_deg: Rotation about the patient's long axis.
        """
        cos, sin = np.float32(np.cos(np.radians(turn_deg))), np.float32(np.sin(np.radians(turn_deg)))
        x, y = self.x * cos - self.y * sin, self.x * sin + self.y * cos
        moved = [place + np.float32(amount_mm) * self.smooth_noise(rng, scale_mm) for place in (self.z, y, x)]
        furthest = max(float(np.abs(new - old).max()) for new, old in zip(moved, self.axes, strict=True))
        return Grid(moved[0], moved[1], moved[2], self.axes, furthest)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis [Z, Y, X]."""
        z, y, x = self.axes
        return z.shape[0], y.shape[1], x.shape[2]

    def ellipsoid(
        self, centre_mm: Sequence[float], radii_mm: Sequence[float], turn_deg: Sequence[float] = (0.0, 0.0, 0.0)
    ) -> Field:
        """Return the squared normalised distance from an ellipsoid's centre: 1 on its surface, at most `_FAR`.

        Args:
            centre_mm: x, y, z of the centre.
            radii_mm: Radii along the ellipsoid's own x, y, z.
            turn_deg: Rotations about x, then y, then z.
        """
        box = self.box(centre_mm, (REACH * max(radii_mm),) * 3)
        offsets = [
            np.broadcast_to(place, self.shape)[box] - np.float32(centre)
            for place, centre in zip((self.x, self.y, self.z), centre_mm, strict=True)
        ]
        to_own = _rotation(turn_deg).T / np.asarray(radii_mm, dtype=np.float64)[:, None]
        total: Field = np.full(self.shape, _FAR, dtype=np.float32)
        total[box] = 0
        for row in to_own.astype(np.float32):
            own = row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2]
            total[box] += own * own
        return total

    def box(self, centre_mm: Sequence[float], reach_mm: Sequence[float]) -> Box:
        """Return where the voxels within a distance of a place are; the rest need not be computed.

        Args:
            centre_mm: x, y, z of the place.
            reach_mm: Distance along x, y, z.
        """
        ranges = []
        for axis, centre, reach in zip(self.axes, tuple(centre_mm)[::-1], tuple(reach_mm)[::-1], strict=True):
            ends = (centre - reach - self.slack_mm, centre + reach + self.slack_mm)
            ranges.append(slice(*(int(end) for end in np.searchsorted(axis.reshape(-1), ends))))
        return ranges[0], ranges[1], ranges[2]

    def cut(self, box: Box) -> "Grid":
        """Return the voxels of a box."""
        z, y, x = (np.broadcast_to(place, self.shape)[box] for place in (self.z, self.y, self.x))
        axes = self.axes[0][box[0]], self.axes[1][:, box[1]], self.axes[2][:, :, box[2]]
        return Grid(z, y, x, axes, self.slack_mm)

    def tube(self, x_mm: float | Reals, y_mm: float | Reals, radius_mm: float | Reals) -> Field:
        """Return the squared normalised distance from an upright tube whose centre may depend on z."""
        value = ((self.x - x_mm) ** 2 + (self.y - y_mm) ** 2) / np.square(radius_mm)
        return np.broadcast_to(value.astype(np.float32), self.shape)

    def smooth_noise(self, rng: np.random.Generator, scale_mm: float) -> Field:
        """Return noise of mean 0 and standard deviation about 1 that varies over `scale_mm` (cubic B-splines)."""
        taps = []
        for axis in self.axes:
            place = (axis.reshape(-1) - axis.min()) / np.float32(scale_mm)
            first = np.floor(place).astype(np.intp)
            taps.append((first, _bspline(place - first)))
        coarse = rng.standard_normal(tuple(int(first.max()) + 4 for first, _ in taps)).astype(np.float32)
        for number, (first, weights) in enumerate(taps):
            along = [-1 if axis == number else 1 for axis in range(3)]
            blended = coarse.take(first, number) * weights[0].reshape(along)
            for tap in range(1, 4):
                blended += coarse.take(first + tap, number) * weights[tap].reshape(along)
            coarse = blended
        # Cubic B-spline weights of unit noise have a variance of 0.479 along each axis, averaged over a cell.
        noise: Field = coarse / np.float32(0.479**1.5)
        return noise


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


@dataclass(frozen=True)
class Canvas:
    """Hounsfield units and labels that are painted over one another.

    Attributes:
        grid: Where the voxels are.
        hu: float32 [Z, Y, X].
        labels: uint8 [Z, Y, X].
    """

    grid: Grid
    hu: Field
    labels: NDArray[np.uint8]

    @classmethod
    def empty(cls, grid: Grid) -> "Canvas":
        """Return air without labels."""
        return cls(grid, np.full(grid.shape, _AIR_HU, dtype=np.float32), np.zeros(grid.shape, dtype=np.uint8))

    def cut(self, box: Box) -> "Canvas":
        """Return the part in a box: what is painted there is painted here."""
        return Canvas(self.grid.cut(box), self.hu[box], self.labels[box])

    def paint(self, inside: Inside, hu: float | Reals, label: int = 0) -> None:
        """Set the values and the label of the voxels inside a shape.

        Args:
            inside: bool [Z, Y, X] or broadcastable to it.
            hu: One value, or [Z, Y, X].
            label: Number in the segmentation; 0 is background.
        """
        np.copyto(self.hu, np.asarray(hu, dtype=np.float32), where=inside)
        np.copyto(self.labels, np.uint8(label), where=inside)
