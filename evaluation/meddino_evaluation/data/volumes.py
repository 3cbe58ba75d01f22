"""Volumes and label maps through SimpleITK: read with their geometry, turned to LPS and back, written as they lay."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from isal import igzip
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.volumes.geometry import Geometry, geometry_from_xyz

MAX_VOXELS = 2**32
"""A header that promises more is refused before memory is taken (a whole-body CT has about 2**29 voxels)."""

_BLOCK_BYTES = 8 << 20
_ISAL_ERROR: type[Exception] = IsalError  # type: ignore[assignment]  # its stub calls the class an instance
GZIP_ERRORS = (EOFError, _ISAL_ERROR, gzip.BadGzipFile)

_BYTES = {
    getattr(sitk, f"sitk{name}{bits}"): bits // 8
    for name, sizes in (("UInt", (8, 16, 32, 64)), ("Int", (8, 16, 32, 64)), ("Float", (32, 64)))
    for bits in sizes
}

_LPS_AXES = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=np.float64)


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
        """Turn the last three axes of an array."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.order))
        steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)
        return np.ascontiguousarray(turned[(..., *steps)])

    def undo(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn the last three axes of an array back."""
        lead = array.ndim - 3
        steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)
        inverse = tuple(int(axis) for axis in np.argsort(self.order))
        return np.ascontiguousarray(array[(..., *steps)].transpose(*range(lead), *(lead + axis for axis in inverse)))


def turn_to_lps(geometry: Geometry) -> Turn:
    """Return the reordering that brings an array nearest to the corpus's orientation (to Superior, Posterior, Left).

    An oblique grid stays oblique: axes are permuted and flipped, nothing is resampled.

    Raises:
        VolumeError: The axes are so skewed that no permutation is nearest.
    """
    closeness = _LPS_AXES @ geometry.axes.T  # [new axis, source axis]
    order = tuple(int(axis) for axis in np.abs(closeness).argmax(axis=1))
    if sorted(order) != [0, 1, 2]:
        raise VolumeError(f"the volume's axes are no right-angled frame: {np.round(geometry.axes, 3).tolist()}")
    flips = [bool(closeness[new, source] < 0) for new, source in enumerate(order)]
    return Turn((order[0], order[1], order[2]), (flips[0], flips[1], flips[2]))


def turned_spacing(geometry: Geometry, turn: Turn) -> tuple[float, float, float]:
    """Return the spacing [mm] along the axes of the turned array."""
    z, y, x = (geometry.spacing_mm[axis] for axis in turn.order)
    return z, y, x


def read_geometry(path: Path) -> Geometry:
    """Read only the header of a 3D volume.

    Raises:
        VolumeError: The file is missing, no image, not 3D, or larger than `MAX_VOXELS`.
    """
    return _header(path)[0]


def read_volume(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Read a 3D volume.

    Returns:
        Array [Z, Y, X] in the file's own axis order and data type, and its geometry.

    Raises:
        VolumeError: The file is missing, no image, not 3D, or larger than `MAX_VOXELS`.
    """
    geometry, reader = _header(path)
    if path.name.endswith(".nii.gz"):
        _check_gzip(path, _stored_bytes(reader))
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be read: {_reason(error)}") from error
    return array.reshape(geometry.shape), geometry


def read_label_map(path: Path) -> tuple[NDArray[np.int32], Geometry]:
    """Read a label map; see `read_volume`.

    Raises:
        VolumeError: As `read_volume`, or a value is no whole number.
    """
    array, geometry = read_volume(path)
    if np.issubdtype(array.dtype, np.floating):
        rounded = np.rint(array)
        if not np.isfinite(array).all() or np.abs(array - rounded).max() > 1e-3:
            raise VolumeError(f"{path} is no label map: it holds values that are no whole numbers")
        array = rounded
    return array.astype(np.int32), geometry


def _header(path: Path) -> tuple[Geometry, sitk.ImageFileReader]:
    if not path.is_file():
        raise VolumeError(f"{path} does not exist")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path} is no readable image: {_reason(error)}") from error
    size = reader.GetSize()
    if len(size) not in (2, 3) or reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"{path}: expected one 3D volume with one value a voxel, found {len(size)} dimensions of {size} with "
            f"{reader.GetNumberOfComponents()} components; split channels into <case>_0000, <case>_0001, ..."
        )
    if int(np.prod(size, dtype=np.int64)) > MAX_VOXELS:
        raise VolumeError(f"{path}: {size} voxels; at most {MAX_VOXELS} are read")
    stored = _stored_bytes(reader)
    if path.suffix == ".nii" and path.stat().st_size < stored:
        # ITK fills what is missing with zeros and says nothing.
        raise VolumeError(f"{path} ends early: {path.stat().st_size} bytes, its header promises {stored}")
    if len(size) == 2:
        (sx, sy), (dx, dy), (ox, oy) = size, reader.GetSpacing(), reader.GetOrigin()
        a, b, c, d = reader.GetDirection()
        return geometry_from_xyz((sx, sy, 1), (dx, dy, 1.0), (ox, oy, 0.0), (a, b, 0, c, d, 0, 0, 0, 1)), reader
    return geometry_from_xyz(size, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()), reader


def _stored_bytes(reader: sitk.ImageFileReader) -> int:
    return int(np.prod(reader.GetSize(), dtype=np.int64)) * _BYTES.get(reader.GetPixelID(), 1)


def _check_gzip(path: Path, stored: int) -> None:
    """Read a compressed file to its end, against its CRC: of a damaged one ITK makes zeros and says nothing."""
    found = 0
    try:
        with igzip.open(path, "rb") as stream:  # type: ignore[no-untyped-call]
            while block := stream.read(_BLOCK_BYTES):
                found += len(block)
    except GZIP_ERRORS as error:
        raise VolumeError(f"{path} is damaged: its compressed data break off or fail their checksum ({error})") from error
    if found < stored:
        raise VolumeError(f"{path} ends early: {found} bytes, its header promises {stored}")


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "unknown reason"
