"""Volumes and label maps written through SimpleITK, in the format that the file's ending names."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import PARTIAL_SUFFIX, told_by_system
from meddino.volumes.geometry import Geometry, geometry_to_xyz


def write_volume(path: Path, voxels: NDArray[Any], geometry: Geometry, orientation: str = "", level: int = -1) -> None:
    """Write voxels [Z, Y, X] where a geometry says, compressed, atomically.

    Args:
        path: Its ending names the format; its folder is made.
        voxels: As they are to stand in the file.
        geometry: Where they lie.
        orientation: Three letters such as "RAS": axes of the file, x first; "" keeps the array's own.
        level: Of compression; -1 is ITK's own choice.

    Raises:
        VolumeError: It cannot be written.
    """
    if voxels.shape != geometry.shape:
        raise ValueError(f"voxels are {voxels.shape}, the geometry says {geometry.shape}")
    image = sitk.GetImageFromArray(voxels)
    spacing, origin, direction = geometry_to_xyz(geometry)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    if orientation:
        image = sitk.DICOMOrient(image, orientation)
    path.parent.mkdir(parents=True, exist_ok=True)
    # ITK chooses the format by the suffix, so the partial file keeps it.
    partial = path.with_name(f"{PARTIAL_SUFFIX[1:]}-{path.name}")
    try:
        with _named_in_utf8(partial) as target:
            sitk.WriteImage(image, str(target), useCompression=True, compressionLevel=level)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, RuntimeError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else "unknown reason"
        raise told_by_system(VolumeError(f"{path} cannot be written: {reason}"), path) from error
    partial.replace(path)


@contextmanager
def _named_in_utf8(path: Path) -> Iterator[Path]:
    """Give a path that SimpleITK takes, which ends the process over one that is no UTF-8; what is written there is moved."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="volume-") as folder:
            target = Path(folder, "file" + "".join(path.suffixes[-2:]).encode("ascii", "ignore").decode())
            yield target
            shutil.copyfile(target, path)
    else:
        yield path


def write_label_map(path: Path, labels: NDArray[Any], geometry: Geometry) -> None:
    """Write a label map [Z, Y, X] with a geometry, atomically, in the first of uint8, uint16, int32 that holds it.

    Raises:
        VolumeError: It cannot be written, or a value is beyond 32 bits.
    """
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    types = [one for one in (np.uint8, np.uint16, np.int32) if np.iinfo(one).min <= low and high <= np.iinfo(one).max]
    if not types:
        raise VolumeError(f"{path} cannot be written: label values {low} to {high} lie beyond 32 bits")
    narrow = labels.astype(types[0])
    write_volume(path, narrow, geometry)
