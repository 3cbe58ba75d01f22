"""Turning volumes to the corpus's orientation: array axes to Superior, Posterior, Left, z from the feet up."""

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddino.core.errors import VolumeError
from meddino.volumes.geometry import Geometry
from meddino.volumes.volume import AxialVolume, Volume

AXIAL_LPS: NDArray[np.float64] = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
OUTSIDE_HU = -1024


def to_axial_lps(
    volume: Volume, max_tilt_deg: float, outside: int = OUTSIDE_HU, max_voxels: int = 1 << 62
) -> tuple[AxialVolume, float]:
    """Turn a volume to axial slices.

    Axes are permuted and flipped to the nearest ones, which changes no voxel. A volume whose axes then still lie further off
    than `max_tilt_deg` is resampled onto an upright grid with its own spacing (linear), each slice when it is asked for. Uneven
    slices are taken from where they lie: between two of them, however far apart, values are interpolated.

    Args:
        volume: As read.
        max_tilt_deg: Largest angle that is only recorded.
        outside: Value of what lies outside the stored voxels, in their own numbers.
        max_voxels: A larger upright volume is refused before memory is taken.

    Returns:
        The volume, and the largest angle in degrees between its axes and the patient's before any resampling.

    Raises:
        VolumeError: The upright volume would be too large.
    """
    order, signs = _nearest_axes(volume.geometry.axes)
    turned = _permuted(volume, order, signs)
    stacked = order.index(0)
    cosines = np.clip(np.einsum("ij,ij->i", turned.geometry.axes, AXIAL_LPS), -1, 1)
    tilt_deg = float(np.degrees(np.arccos(cosines)).max())
    if tilt_deg > max_tilt_deg:
        return _resampled(turned, stacked, outside, max_voxels), tilt_deg
    places, notes = turned.places_mm, turned.notes
    if places is not None and stacked != 0:
        places, notes = None, (*notes, "uneven slice distance lies inside the new slices")
    return AxialVolume(turned.voxels, turned.geometry, places, notes), tilt_deg


def _nearest_axes(axes: NDArray[np.float64]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return which stored axis becomes axis 0, 1, 2 (the best match over all three) and whether it is flipped."""
    likeness = axes @ AXIAL_LPS.T  # [stored axis, wanted axis]
    order = max(permutations(range(3)), key=lambda picks: sum(abs(likeness[stored, want]) for want, stored in enumerate(picks)))
    signs = np.array([1.0 if likeness[stored, want] >= 0 else -1.0 for want, stored in enumerate(order)])
    return order, signs


def _permuted(volume: Volume, order: tuple[int, ...], signs: NDArray[np.float64]) -> Volume:
    """Return the volume with its axes in another order and direction; its places are those along what was axis 0."""
    old, places = volume.geometry, volume.places_mm
    voxels = np.transpose(volume.voxels, order)
    axes = old.axes[list(order)]
    spacing = [old.spacing_mm[stored] for stored in order]
    extents = [spacing[axis] * (voxels.shape[axis] - 1) for axis in range(3)]
    if places is not None:
        extents[order.index(0)] = places[-1]
    origin = np.asarray(old.origin_mm, dtype=np.float64)
    for axis in range(3):
        if signs[axis] < 0:
            voxels = np.flip(voxels, axis)
            origin = origin + axes[axis] * extents[axis]
    if places is not None and signs[order.index(0)] < 0:
        places = tuple(places[-1] - place for place in reversed(places))
    geometry = Geometry(
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        axes=axes * signs[:, None],
    )
    return replace(volume, voxels=voxels, geometry=geometry, places_mm=places)


def _resampled(volume: Volume, stacked: int, outside: int, max_voxels: int) -> AxialVolume:
    """Return the volume on an upright grid; its places, where it has any, are those along axis `stacked`."""
    old, note, uneven = volume.geometry, "oblique: resampled upright", None
    even = list(old.spacing_mm)
    if volume.places_mm is not None:
        places = np.asarray(volume.places_mm)
        even[stacked] = float(places[-1]) / (len(places) - 1)  # as many slices at even distances from the first to the last
        uneven = stacked, places / even[stacked]
        note += f", interpolated over up to {np.diff(places).max():.1f} mm between slices"
    corners = replace(old, spacing_mm=(even[0], even[1], even[2])).corners_mm()
    low, high = corners.min(axis=0), corners.max(axis=0)
    spacing = np.asarray(old.spacing_mm)
    size = np.maximum(np.floor((high - low) @ AXIAL_LPS.T / spacing).astype(int) + 1, 1)
    if int(np.prod(size, dtype=object)) > max_voxels:
        raise VolumeError(f"{np.prod(size, dtype=object)} voxels once upright; limits.max_volume_voxels is {max_voxels}")
    to_voxels = np.linalg.inv(old.axes * np.asarray(even)[:, None])
    matrix, offset = ((AXIAL_LPS * spacing[:, None]) @ to_voxels).T, (low - np.asarray(old.origin_mm)) @ to_voxels
    shape = (int(size[0]), int(size[1]), int(size[2]))
    geometry = Geometry(shape, old.spacing_mm, (float(low[0]), float(low[1]), float(low[2])), AXIAL_LPS)
    planes = _UprightPlanes(volume.voxels, shape, matrix, offset, outside, uneven)
    return AxialVolume(planes, geometry, None, (*volume.notes, note))


class _UprightPlanes:
    """Slices of an upright grid, each computed from the stored voxels when it is asked for.

    The upright grid round a tilted block has up to several times its voxels: it is never held. SciPy reads the stored voxels
    where they lie, turned over or not; ITK would hold a copy of them.

    Args:
        voxels: [Z, Y, X] as stored, in the nearest order of axes.
        shape: Slices, rows, columns of the upright grid.
        matrix: From upright to stored voxel indices, [3, 3]; uneven slices are numbered as if they were even.
        offset: Stored index of the upright grid's first voxel, [3].
        outside: Value beyond the stored voxels.
        uneven: Where slices are uneven: the axis along which they are, and where on it each of them lies, in indices of even
            slices, rising from 0 to the last one's number.
    """

    def __init__(
        self,
        voxels: NDArray[Any],
        shape: tuple[int, int, int],
        matrix: NDArray[np.float64],
        offset: NDArray[np.float64],
        outside: int,
        uneven: tuple[int, NDArray[np.float64]] | None = None,
    ) -> None:
        self.shape, self.dtype = shape, voxels.dtype
        self._voxels, self._matrix, self._offset, self._uneven = voxels, matrix, offset, uneven
        fits = np.iinfo(voxels.dtype) if voxels.dtype.kind in "iu" else None
        self._outside = outside if fits is None else min(max(outside, fits.min), fits.max)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, z: int, /) -> NDArray[Any]:
        if not 0 <= z < len(self):
            raise IndexError(z)
        plane: NDArray[Any] = np.empty(self.shape[1:], dtype=self.dtype)
        offset = self._offset + self._matrix[:, 0] * z
        if self._uneven is None:
            ndimage.affine_transform(
                self._voxels, self._matrix, offset, output=plane[None], order=1, cval=self._outside, prefilter=False
            )
            return plane
        rows, cols = np.ogrid[: self.shape[1], : self.shape[2]]
        indices = np.stack([offset[axis] + self._matrix[axis, 1] * rows + self._matrix[axis, 2] * cols for axis in range(3)])
        axis, places = self._uneven
        indices[axis] = np.interp(indices[axis], places, np.arange(len(places)), left=-1, right=len(places))
        ndimage.map_coordinates(self._voxels, indices, output=plane, order=1, cval=self._outside, prefilter=False)
        return plane


@dataclass(frozen=True)
class Turn:
    """How the axes of an array were reordered and flipped, so that it can be undone.

    Attributes:
        order: Source axis of each new axis.
        flips: Whether each new axis runs against its source axis.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn the last three axes of an array [..., Z, Y, X]."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.order))
        return np.ascontiguousarray(turned[self._steps()])

    def undo(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn the last three axes of an array that `apply` turned back to how they were stored."""
        lead = array.ndim - 3
        inverse = tuple(int(axis) for axis in np.argsort(self.order))
        return np.ascontiguousarray(array[self._steps()].transpose(*range(lead), *(lead + axis for axis in inverse)))

    def spacing_mm(self, geometry: Geometry) -> tuple[float, float, float]:
        """Return the spacing along the axes of the turned array."""
        z, y, x = (geometry.spacing_mm[axis] for axis in self.order)
        return z, y, x

    def _steps(self) -> tuple[Any, ...]:
        return (..., *(slice(None, None, -1) if flip else slice(None) for flip in self.flips))


def turn_to_lps(geometry: Geometry) -> Turn:
    """Return the reordering that brings an array nearest to the corpus's orientation (to Superior, Posterior, Left).

    An oblique grid stays oblique: axes are permuted and flipped, nothing is resampled.
    """
    (z, y, x), signs = _nearest_axes(geometry.axes)
    return Turn((z, y, x), (bool(signs[0] < 0), bool(signs[1] < 0), bool(signs[2] < 0)))
