"""NIfTI, NRRD and MetaImage files, checked before memory is taken; the latter two through SimpleITK."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_of, open_file
from meddino.volumes.file_kinds import has_dicom_magic, read_head, unpacked_head, volume_format
from meddino.volumes.formats.nifti import GZIP_ERRORS, read_nifti_header, read_nifti_voxels
from meddino.volumes.formats.voxel_files import VoxelFiles, find_voxel_files
from meddino.volumes.geometry import Geometry, geometry_from_xyz
from meddino.volumes.limits import ReadLimits
from meddino.volumes.native import file_in_memory, quiet_native, raise_if_memory_ran_out
from meddino.volumes.volume import Volume

_IMAGE_IO = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_FORMAT_NAMES = {"nifti": "NIfTI", "nrrd": "NRRD", "metaimage": "MetaImage", "dicom": "DICOM"}
_PIXEL_BYTES = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}
_UNIT_MM = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "millimetres": 1.0, "cm": 10.0, "centimeter": 10.0,
    "m": 1000.0, "meter": 1000.0, "um": 0.001, "µm": 0.001, "μm": 0.001, "micron": 0.001, "microns": 0.001, "micrometer": 0.001,
}  # fmt: skip
_Opened = tuple[sitk.ImageFileReader, Geometry, tuple[str, ...], dict[str, str]]


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
    _check_format(path, format)
    if format == "nifti":
        header = read_nifti_header(path, limits)
        promised = int(np.prod(header.shape)) * header.dtype.itemsize
        VoxelFiles((), "unknown").check_promise(path, promised)
        voxels = read_nifti_voxels(path, header)
        return Volume(voxels, header.geometry, notes=header.notes, irregular=header.irregular)
    with _opened(path, format, limits) as (reader, geometry, notes, fields):
        try:
            with quiet_native():
                image = reader.Execute()
        except RuntimeError as error:
            raise_if_memory_ran_out(error)
            raise VolumeError("voxels cannot be read: file is truncated or damaged") from error
    voxels = sitk.GetArrayViewFromImage(image).reshape(geometry.shape)
    return Volume(_rescaled(voxels, fields), geometry, notes=notes, owner=image)


def read_geometry_of_file(path: Path, format: str, limits: ReadLimits) -> Geometry:
    """Read only the grid; raises as `read_volume_file`."""
    _check_format(path, format)
    if format == "nifti":
        return read_nifti_header(path, limits).geometry
    with _opened(path, format, limits) as (_, geometry, _, _):
        return geometry


@contextmanager
def _opened(path: Path, format: str, limits: ReadLimits) -> Iterator[_Opened]:
    """Give a reader that is ready, the grid, what was assumed of it, and the header's own words."""
    voxel_files = find_voxel_files(path, format)  # before ITK, which opens whatever file a header names
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_IMAGE_IO[format])
    with _readable(path, voxel_files) as readable:
        reader.SetFileName(str(readable))
        try:
            with quiet_native():
                reader.ReadImageInformation()
        except RuntimeError as error:
            cause = " (axes are not at right angles)" if "orthonormal" in str(error).lower() else ""
            raise VolumeError(f"{_FORMAT_NAMES[format]} header cannot be read{cause}") from error
        size = reader.GetSize()
        voxels = limits.check(size)
        if reader.GetNumberOfComponents() != 1:
            raise VolumeError(f"voxels have {reader.GetNumberOfComponents()} components; a volume has 1")
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        voxel_files.check_promise(path, voxels * next((count for name, count in _PIXEL_BYTES.items() if name in kind), 1))
        if len(size) > 3:
            reader.SetExtractSize([*size[:3], *([0] * (len(size) - 3))])  # a volume with useless further axes
        geometry, notes = _assumed(_geometry(reader), format, voxel_files.fields, limits)
        if not np.isfinite([*geometry.spacing_mm, *geometry.origin_mm]).all() or min(geometry.spacing_mm) <= 0:
            raise VolumeError(f"voxel spacing {[round(value, 4) for value in geometry.spacing_mm]} mm; must be above 0")
        yield reader, geometry, notes, voxel_files.fields


@contextmanager
def _readable(path: Path, voxel_files: VoxelFiles) -> Iterator[Path]:
    """Give a file a path that SimpleITK takes: it may lie in an archive, and old shares have names that are no UTF-8."""
    if archive_of(path) is not None:
        with open_file(path) as stream, file_in_memory(lambda target: shutil.copyfileobj(stream, target)) as name:
            yield Path(name)
        return
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="volume-") as folder:
            for file in voxel_files.files:
                link = Path(folder, file.relative_to(path.parent))
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.absolute())
            header = Path(folder, f"header{path.suffix}")
            header.symlink_to(path.absolute())
            yield header
    else:
        yield path


def _geometry(reader: sitk.ImageFileReader) -> Geometry:
    dimension = len(reader.GetSize())
    size, spacing = ((*values, 1, 1)[:3] for values in (reader.GetSize(), reader.GetSpacing()))
    matrix = np.eye(max(dimension, 3))
    matrix[:dimension, :dimension] = np.asarray(reader.GetDirection()).reshape(dimension, dimension)
    return geometry_from_xyz(size, spacing, (*reader.GetOrigin(), 0.0)[:3], matrix[:3, :3].ravel().tolist())


def _assumed(geometry: Geometry, format: str, fields: dict[str, str], limits: ReadLimits) -> tuple[Geometry, tuple[str, ...]]:
    """Return the grid in millimetres, and what the file does not say of it: ITK takes 1 mm, mm and LPS without a word.

    Raises:
        VolumeError: It names no voxel size, or units that are none of length.
    """
    is_nrrd = format == "nrrd"
    sized = ("space directions", "spacings") if is_nrrd else ("elementspacing", "elementsize")
    notes: list[str] = []
    scale = 1.0
    if not any(name in fields for name in sized):
        if limits.missing_spacing_mm is None:
            raise VolumeError("voxel size is not in the file; limits.missing_spacing_mm says which to take")
        scale = limits.missing_spacing_mm
        notes.append(f"voxel size is not in the file: taken as {scale:g} mm")
    else:
        written = fields.get("space units" if is_nrrd else "distanceunits", "")
        units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', written) or written.split()} - {"", "?"}
        if not units <= set(_UNIT_MM) or len({_UNIT_MM[unit] for unit in units}) > 1:
            raise VolumeError(
                f"units of the voxel size are {', '.join(sorted(units))[:60]}; known are mm, cm, m, um, one for all axes"
            )
        if units:
            scale = _UNIT_MM[min(units)]
        elif is_nrrd:
            notes.append("units are not in the file: taken as mm")
    oriented = ("space", "space directions") if is_nrrd else ("transformmatrix", "orientation", "rotation")
    if not (all if is_nrrd else any)(name in fields for name in oriented):
        notes.append("orientation is not in the file: axes taken to run to left, back and up")
    z, y, x = (value * scale for value in geometry.spacing_mm)
    a, b, c = (value * scale for value in geometry.origin_mm)
    return replace(geometry, spacing_mm=(z, y, x), origin_mm=(a, b, c)), tuple(notes)


def _rescaled(voxels: NDArray[Any], fields: dict[str, str]) -> NDArray[Any]:
    """Return the values that MetaImage's own rescale makes, which ITK leaves out."""
    names = ("elementtointensityfunctionslope", "elementtointensityfunctionoffset")
    try:
        slope, offset = (float(fields.get(name, default)) for name, default in zip(names, ("1", "0"), strict=True))
    except ValueError as error:
        raise VolumeError("MetaImage header's rescale is no number") from error
    if (slope, offset) == (1.0, 0.0) or not np.isfinite([slope, offset]).all() or slope == 0:
        return voxels
    if slope == 1.0 and offset == int(offset) and voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2:
        return np.asarray(voxels.astype(np.int32) + int(offset))
    return np.asarray(voxels.astype(np.float32) * np.float32(slope) + np.float32(offset))


def _check_format(path: Path, format: str) -> None:
    found = sniff_format(path)
    if found != format:
        holds = f"holds {_FORMAT_NAMES[found]}" if found else "is none"
        raise VolumeError(f"file is named as {_FORMAT_NAMES[format]} and {holds}")


def sniff_format(path: Path) -> str | None:
    """Return the format that a file's first bytes show, or None.

    Raises:
        VolumeError: It cannot be opened.
    """
    try:
        head = read_head(path)
        unpacked = unpacked_head(path, head)
    except GZIP_ERRORS as error:
        raise VolumeError("gzip data, or the archive it lies in, is truncated or damaged") from error
    except OSError as error:
        raise VolumeError(f"file cannot be read: {cause_without_path(error)}") from error
    shown = head if unpacked is None else unpacked
    return volume_format(shown) or ("dicom" if has_dicom_magic(shown) else None)
