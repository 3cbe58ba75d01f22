"""What a user would draw for a mask: a box around it, with sides moved out, or points inside."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prompt:
    """A box or points in the pixels of one slice, x to the right and y down; pixel centres are whole numbers.

    Attributes:
        box: x0, y0, x1, y1 of the outermost pixels, or None.
        points: (x, y) of each point inside.
    """

    box: Box | None = None
    points: tuple[tuple[float, float], ...] = ()

    def scaled(self, along_x: float, along_y: float) -> "Prompt":
        """Return it in the pixels of a slice that was resized by these factors; pixel borders stay where they are."""

        def moved(x: float, y: float) -> tuple[float, float]:
            return (x + 0.5) * along_x - 0.5, (y + 0.5) * along_y - 0.5

        box = None if self.box is None else (*moved(*self.box[:2]), *moved(*self.box[2:]))
        return Prompt(box, tuple(moved(*one) for one in self.points))


def box_of(mask: NDArray[np.bool_]) -> Box:
    """Return the smallest box that holds a mask [H, W], which is not empty."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(cols[0]), float(rows[0]), float(cols[-1]), float(rows[-1])


def moved_out(box: Box, most_px: int, shape: tuple[int, int], rng: np.random.Generator) -> Box:
    """Move each side out by 0 to `most_px` whole pixels, at most to the border of the picture.

    Source: LVM-Med; there boxes were scaled by the embedding's size, here they are in pixels of the picture.
    """
    left, top, right, bottom = rng.integers(0, most_px + 1, 4).tolist()
    rows, cols = shape
    x0, y0, x1, y1 = box
    return max(0.0, x0 - left), max(0.0, y0 - top), min(cols - 1.0, x1 + right), min(rows - 1.0, y1 + bottom)


def points_in(mask: NDArray[np.bool_], count: int, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Return points in a mask [H, W]: the one deepest inside, then drawn ones."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), mask.shape)
    places = np.argwhere(mask)
    drawn = places[rng.integers(len(places), size=count - 1)]
    return ((float(x), float(y)), *((float(col), float(row)) for row, col in drawn))
