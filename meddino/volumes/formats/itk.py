"""NIfTI, NRRD and MetaImage files, checked before memory is taken; the latter two through SimpleITK."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_of, open_file
from meddino.volumes.file_kinds import has_dicom_magic, read_head, unpacked_head, volume_format
from meddino.volumes.formats.intercept import add_whole, is_whole
from meddino.volumes.formats.itk_grid import read_grid
from meddino.volumes.formats.nifti import GZIP_ERRORS, read_nifti_header, read_nifti_voxels
from meddino.volumes.formats.voxel_files import VoxelFiles, find_voxel_files
from meddino.volumes.geometry import Geometry
from meddino.volumes.limits import ReadLimits
from meddino.volumes.native import file_in_memory, quiet_native, raise_if_memory_ran_out
from meddino.volumes.volume import Volume

_IMAGE_IO = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_FORMAT_NAMES = {"nifti": "NIfTI", "nrrd": "NRRD", "metaimage": "MetaImage", "dicom": "DICOM"}
_PIXEL_BYTES = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}


@dataclass(frozen=True)
class _Opened:
    """A file whose header was read.

    Attributes:
        reader: Ready for the voxels.
        geometry: The grid.
        notes: What is unusual or assumed, in words of ours.
        irregular: Why the grid is not quite that of the voxels, or "".
        voxel_files: Where they lie.
        promised: Bytes of voxels.
    """

    reader: sitk.ImageFileReader
    geometry: Geometry
    notes: tuple[str, ...]
    irregular: str
    voxel_files: VoxelFiles
    promised: int


class _ImageMemory:
    """Shows numpy the voxels of an image; the image lives as long as any array that looks at them.

    `GetArrayViewFromImage` alone leaves that to its caller: a view whose image is gone shows whatever came into its memory.
    """

    def __init__(self, image: sitk.Image) -> None:
        self._image = image
        self.__array_interface__ = sitk.GetArrayViewFromImage(image).__array_interface__


def read_volume_file(path: Path, format: str, limits: ReadLimits) -> Volume:
    """Read one volume.

    Args:
        path: The file.
        format: "nifti", "nrrd" or "metaimage", from its name or its first bytes.
        limits: What it may ask of the machine.

    Raises:
        VolumeError: It is damaged, of another format, too large, has the wrong number of axes, or holds other than the voxels
            that its header promises. The message names no path.
        MemoryError: There is not enough memory for it.
    """
    _check_format(path, format)
    if format == "nifti":
        header = read_nifti_header(path, limits)
        promised = int(np.prod(header.shape)) * header.dtype.itemsize
        VoxelFiles((), "unknown").check_promise(path, promised)
        voxels = read_nifti_voxels(path, header)
        return Volume(voxels, header.geometry, notes=header.notes, irregular=header.irregular)
    with _opened(path, format, limits) as file:
        file.voxel_files.check_length(path, file.promised, max(file.geometry.shape))
        try:
            with quiet_native():
                image = file.reader.Execute()
        except RuntimeError as error:
            raise_if_memory_ran_out(error)
            raise VolumeError("voxels cannot be read: file is truncated or damaged") from error
    voxels = np.asarray(_ImageMemory(image)).reshape(file.geometry.shape)
    return Volume(_rescaled(voxels, file.voxel_files.fields), file.geometry, notes=file.notes, irregular=file.irregular)


def read_geometry_of_file(path: Path, format: str, limits: ReadLimits) -> Geometry:
    """Read only the grid; raises as `read_volume_file`."""
    _check_format(path, format)
    if format == "nifti":
        return read_nifti_header(path, limits).geometry
    with _opened(path, format, limits) as file:
        return file.geometry


@contextmanager
def _opened(path: Path, format: str, limits: ReadLimits) -> Iterator[_Opened]:
    """Read the header of an NRRD or MetaImage file, and hold it open."""
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
        promised = voxels * next((count for name, count in _PIXEL_BYTES.items() if name in kind), 1)
        voxel_files.check_promise(path, promised)
        if len(size) > 3:
            reader.SetExtractSize([*size[:3], *([0] * (len(size) - 3))])  # a volume with useless further axes
        geometry, notes, irregular = read_grid(reader, format, voxel_files.fields, limits)
        yield _Opened(reader, geometry, notes, irregular, voxel_files, promised)


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


def _rescaled(voxels: NDArray[Any], fields: dict[str, str]) -> NDArray[Any]:
    """Return the values that MetaImage's own rescale makes, which ITK leaves out."""
    names = ("elementtointensityfunctionslope", "elementtointensityfunctionoffset")
    try:
        slope, offset = (float(fields.get(name, default)) for name, default in zip(names, ("1", "0"), strict=True))
    except ValueError as error:
        raise VolumeError("MetaImage header's rescale is no number") from error
    if (slope, offset) == (1.0, 0.0) or not np.isfinite([slope, offset]).all() or slope == 0:
        return voxels
    if slope == 1.0 and is_whole(offset) and voxels.dtype.kind in "iu":
        return add_whole(voxels, int(offset), least_bytes=4)
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
