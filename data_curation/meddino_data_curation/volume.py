"""A volume in memory, as its file has it, and the readers' common part."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from meddino.data.geometry import Geometry


@dataclass
class Volume:
    """Voxels and where they lie.

    Attributes:
        voxels: [Z, Y, X], any real type; a view is fine.
        geometry: The grid. Its spacing along axis 0 is the median distance where slices are uneven.
        places_mm: Position of each slice along axis 0 from the first one; None where slices are even.
        notes: What is unusual, in words of ours.
        owner: Whoever owns the memory that `voxels` is a view of.
    """

    voxels: NDArray[Any]
    geometry: Geometry
    places_mm: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    owner: object = None

    def place_mm(self, z: int) -> float:
        """Return the position of a slice along axis 0 from the first one."""
        return self.places_mm[z] if self.places_mm else self.geometry.spacing_mm[0] * z
