"""NIfTI, NRRD and MetaImage through SimpleITK, checked before memory is taken."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.file_kinds import has_dicom_magic, read_head, unpacked_head, volume_format, volume_suffix
from meddino.volumes.geometry import Geometry, geometry_from_xyz
from meddino.volumes.limits import ReadLimits
from meddino.volumes.nifti import GZIP_ERRORS, read_nifti_header, read_nifti_voxels
from meddino.volumes.volume import Volume
from meddino.volumes.voxel_files import VoxelFiles, find_voxel_files

_IMAGE_IO = {"nifti": "NiftiImageIO", "nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_FORMAT_NAMES = {"nifti": "NIfTI", "nrrd": "NRRD", "metaimage": "MetaImage", "dicom": "DICOM"}
_PIXEL_BYTES = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}

# A shear that rounding brought into the matrix would otherwise refuse the file; nifti.py notes a real one.
os.environ.setdefault("ITK_NIFTI_SFORM_PERMISSIVE", "1")


def read_volume_file(path: Path, format: str, limits: ReadLimits) -> Volume:
    """Read one volume.

    Args:
        path: The file.
        format: "nifti", "nrrd" or "metaimage", from its name or its first bytes.
        limits: What it may ask of the machine.

    Raises:
        VolumeError: It is damaged, of another format, too large, or has the wrong number of axes. The message names no path.
        MemoryError: There is not enough memory for it.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote paths: they must not reach a log
    found = sniff_format(path)
    if found != format:
        holds = f"holds {_FORMAT_NAMES[found]}" if found else "is none"
        raise VolumeError(f"file is named as {_FORMAT_NAMES[format]} and {holds}")
    # Before ITK, which opens whatever file a header names. How many bytes scaled NIfTI voxels have ITK does not tell.
    voxel_files = VoxelFiles((), "unknown") if format == "nifti" else find_voxel_files(path, format)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_IMAGE_IO[format])
    try:
        with _named_as_nifti(path) if format == "nifti" else nullcontext(path) as readable:
            reader.SetFileName(str(readable))
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{_FORMAT_NAMES[format]} header cannot be read{_known_cause(error)}") from error
    size = reader.GetSize()
    voxel_files.check_promise(path, _checked_bytes(size, reader, limits))
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])  # one time point: a volume with a useless fourth axis
    voxels, geometry, owner, notes = _nifti(path, reader) if format == "nifti" else _through_itk(reader)
    if not np.isfinite([*geometry.spacing_mm, *geometry.origin_mm]).all() or min(geometry.spacing_mm) <= 0:
        raise VolumeError(f"voxel spacing {[round(value, 4) for value in geometry.spacing_mm]} mm; must be above 0")
    return Volume(voxels, geometry, notes=notes, owner=owner)


@contextmanager
def _named_as_nifti(path: Path) -> Iterator[Path]:
    """Give a file the ending by which ITK knows NIfTI, where it has none."""
    if volume_suffix(path.name):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nifti-") as folder:
        link = Path(folder, "volume.nii.gz" if read_head(path)[:2] == b"\x1f\x8b" else "volume.nii")
        link.symlink_to(path.absolute())
        yield link


def _nifti(path: Path, reader: sitk.ImageFileReader) -> tuple[NDArray[Any], Geometry, None, tuple[str, ...]]:
    header = read_nifti_header(path)
    size = (*reader.GetSize(), 1, 1)[:3]
    spacing, origin = ((*values, 1.0)[:3] for values in (reader.GetSpacing(), (*reader.GetOrigin(), 0.0)))
    dimension = len(reader.GetSize())
    matrix = np.eye(max(dimension, 3))
    matrix[:dimension, :dimension] = np.asarray(reader.GetDirection()).reshape(dimension, dimension)
    if size[::-1] != header.shape:
        raise VolumeError(f"NIfTI header says {list(header.shape)} and {list(size[::-1])} voxels")
    geometry = geometry_from_xyz(size, spacing, origin[:3], matrix[:3, :3].ravel().tolist())
    return read_nifti_voxels(path, header), geometry, None, header.notes


def _through_itk(reader: sitk.ImageFileReader) -> tuple[NDArray[Any], Geometry, sitk.Image, tuple[str, ...]]:
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise_if_memory_ran_out(error)
        raise VolumeError(f"voxels cannot be read: file is truncated or damaged{_known_cause(error)}") from error
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    geometry = geometry_from_xyz(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    return sitk.GetArrayViewFromImage(image), geometry, image, ()


def sniff_format(path: Path) -> str | None:
    """Return the format that a file's first bytes show, or None.

    Raises:
        VolumeError: It cannot be opened.
    """
    try:
        head = read_head(path)
        unpacked = unpacked_head(path, head)
    except GZIP_ERRORS as error:
        raise VolumeError("gzip data is truncated or damaged") from error
    except OSError as error:
        raise VolumeError(f"file cannot be read: {cause_without_path(error)}") from error
    shown = head if unpacked is None else unpacked
    return volume_format(shown) or ("dicom" if has_dicom_magic(shown) else None)


def _checked_bytes(size: tuple[int, ...], reader: sitk.ImageFileReader, limits: ReadLimits) -> int:
    """Return how many bytes of voxels a header promises, if that is a size that may be read."""
    if len(size) not in (2, 3, 4):
        raise VolumeError(f"image has {len(size)} axes; a volume has 3")
    if min(size) < 1:
        raise VolumeError(f"an axis has no voxels: size {list(size)}")
    if len(size) == 4 and size[3] > 1:
        raise VolumeError(f"image has {size[3]} time points or channels; a volume has 1")
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(f"voxels have {reader.GetNumberOfComponents()} components; HU have 1")
    if max(size) > limits.max_axis_px:
        raise VolumeError(f"an axis of {max(size)} voxels; limits.max_axis_px is {limits.max_axis_px}")
    voxels = int(np.prod([int(value) for value in size], dtype=object))
    if voxels > limits.max_volume_voxels:
        raise VolumeError(f"{voxels} voxels; limits.max_volume_voxels is {limits.max_volume_voxels}")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    return voxels * next((count for name, count in _PIXEL_BYTES.items() if name in kind), 1)


def _known_cause(error: BaseException) -> str:
    """Return the cause in words of ours: ITK's messages quote paths."""
    return " (axes are not at right angles)" if "orthonormal" in str(error).lower() else ""


def raise_if_memory_ran_out(error: RuntimeError) -> None:
    """Raise MemoryError where that is what ITK's error means: it has one type for everything.

    Raises:
        MemoryError: Without a message.
    """
    if re.search(r"bad_alloc|allocate memory|out of memory", str(error), re.IGNORECASE):
        raise MemoryError from error


def use_one_thread() -> None:
    """Keep ITK from starting threads of its own, in a process that is one of many."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
