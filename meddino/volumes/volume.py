"""A volume as its file has it, and a volume turned to the corpus's orientation."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from meddino.volumes.geometry import Geometry


@dataclass(repr=False)
class Volume:
    """Voxels and where they lie; `np.asarray(volume)` gives the voxels.

    Attributes:
        voxels: [Z, Y, X], any real type; a view is fine.
        geometry: The grid. Its spacing along axis 0 is the median distance where slices are uneven.
        places_mm: Position of each slice along axis 0 from the first one; None where slices are even.
        notes: What is unusual and what was decided for it, in words of ours.
        modality: DICOM's code where the file says it ("CT", "MR"); "" where it does not.
        photometric: DICOM's PhotometricInterpretation; "" where there is none. Values are never turned over for it.
        irregular: Why the grid does not say where every voxel lies (missing slices, shear); "" where it does.
    """

    voxels: NDArray[Any]
    geometry: Geometry
    places_mm: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    modality: str = ""
    photometric: str = ""
    irregular: str = ""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each axis of the array."""
        return self.geometry.spacing_mm

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4: from array indices (z, y, x, 1) to the patient's position [mm] (LPS, x y z, 1).

        The affine of nibabel, which indexes x, y, z and looks to RAS, is `np.diag([-1, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]]`.
        """
        return self.geometry.affine

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.voxels, dtype=dtype) if copy else np.asarray(self.voxels, dtype=dtype)

    def __repr__(self) -> str:
        spacing = " x ".join(f"{value:.4g}" for value in self.spacing_mm)
        facts = [f"{self.voxels.dtype} {list(self.voxels.shape)}", f"{spacing} mm", self.modality or "modality not said"]
        notes = "".join(f"\n  {note}" for note in (*self.notes, *([self.irregular] if self.irregular else [])))
        return f"Volume({', '.join(facts)}){notes}"


@runtime_checkable
class Planes(Protocol):
    """Axial slices by number: an array, or what computes them one at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Slices, rows, columns."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def __len__(self) -> int:
        """Return the number of slices."""

    def __getitem__(self, z: int, /) -> NDArray[Any]:
        """Return one slice, [rows, cols]."""


@dataclass
class AxialVolume:
    """A volume whose array axes run to Superior, Posterior, Left.

    Attributes:
        planes: Its slices from the feet up, any real type.
        geometry: The grid, as in `Volume`.
        places_mm: As in `Volume`.
        notes: As in `Volume`.
    """

    planes: Planes
    geometry: Geometry
    places_mm: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def place_mm(self, z: int) -> float:
        """Return the position of a slice along axis 0 from the first one."""
        return self.places_mm[z] if self.places_mm else self.geometry.spacing_mm[0] * z
