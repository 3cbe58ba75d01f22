"""A volume from a path: one file, or a folder of DICOM files that hold one."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_of, files_below, is_archive, is_packed_folder, problem_of
from meddino.volumes.dicom.grouping import group_series
from meddino.volumes.dicom.headers import DicomHeader, read_header
from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.dicom.stacking import DicomStack, split_series
from meddino.volumes.file_kinds import is_companion, looks_like_dicom, read_head, volume_suffix
from meddino.volumes.formats.itk import read_geometry_of_file, read_volume_file, sniff_format
from meddino.volumes.geometry import Geometry
from meddino.volumes.limits import ReadLimits
from meddino.volumes.volume import Volume

_LIMITS = ReadLimits()


@dataclass(frozen=True)
class FoundSeries:
    """One volume, or what was refused as none, among DICOM files.

    Attributes:
        stack: Its slices; None where it is refused.
        files: Paths, those of a stack in its order of files.
        problem: Why it is refused, or "".
    """

    stack: DicomStack | None
    files: tuple[Path, ...]
    problem: str = ""

    def files_of_slices(self) -> list[Path]:
        """Return the file of each slice, in the order of the volume's slices."""
        return [] if self.stack is None else [self.stack.files[item.file] for item in self.stack.slices]

    def read(self, limits: ReadLimits = _LIMITS) -> Volume:
        """Read it; see `read_dicom_volume`."""
        if self.stack is None:
            raise VolumeError(self.problem)
        return read_dicom_volume(self.stack, limits)


def read_volume(path: Path, limits: ReadLimits = _LIMITS) -> Volume:
    """Read a 3D volume.

    Args:
        path: A file in any format that is read, a folder of DICOM files that hold one volume, or an archive of one volume;
            the path of a file in an archive goes on behind it as behind a folder.
        limits: What it may ask of the machine.

    Raises:
        VolumeError: It is missing, unreadable, no volume, too large for the limits or the memory, or several; the message
            begins with the path.
        OSError: The system is in trouble (a full disk, a network that is gone), not the file.
    """
    try:
        file, format = _only_volume(path)
        return _only_series(file).read(limits) if format == "dicom" else read_volume_file(file, format, limits)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    except MemoryError as error:
        raise VolumeError(f"{path}: not enough memory to read it, or a damaged header that asks for too much") from error


def read_geometry(path: Path) -> Geometry:
    """Read only the grid of a volume; raises as `read_volume`."""
    try:
        file, format = _only_volume(path)
        if format == "dicom":
            return _only_series(file).read().geometry
        return read_geometry_of_file(file, format, _LIMITS)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error


def read_label_map(path: Path) -> tuple[NDArray[np.int32], Geometry]:
    """Read a label map; see `read_volume`.

    Raises:
        VolumeError: As `read_volume`, or a value is no whole number or beyond 32 bits.
    """
    volume = read_volume(path)
    voxels = volume.voxels
    if np.issubdtype(voxels.dtype, np.floating):
        rounded = np.rint(voxels)
        if not np.isfinite(voxels).all() or np.abs(voxels - rounded).max() > 1e-3:
            raise VolumeError(f"{path} is no label map: it holds values that are no whole numbers")
        voxels = rounded
    fits = np.iinfo(np.int32)
    if voxels.size and not fits.min <= (far := max(int(voxels.max()), -int(voxels.min()))) <= fits.max:
        # The conversion would wrap around: 2^32 + 1 becomes label 1.
        raise VolumeError(f"{path} is no label map: it holds {far}; label values lie within 32 bits")
    return voxels.astype(np.int32), volume.geometry


def find_series(path: Path) -> list[FoundSeries]:
    """Return every volume among the DICOM files of a folder and those below it, or of one file; in a fixed order."""
    headers = [header for file in _files(path) if (header := _header(file, path)) is not None]
    found = []
    for series in group_series(headers):
        refused: dict[str, list[DicomHeader]] = defaultdict(list)
        usable: dict[str, list[DicomHeader]] = defaultdict(list)
        for header in series.headers:
            (refused[why] if (why := header.why_not(header.modality or "CT")) else usable[header.modality]).append(header)
        found += [FoundSeries(None, tuple(header.path for header in files), why) for why, files in sorted(refused.items())]
        for _, files in sorted(usable.items()):
            found += [
                FoundSeries(part.stack, part.stack.files, part.stack.problem) for part in split_series(files, series.notes)
            ]
    return found


def _only_series(path: Path) -> FoundSeries:
    found = find_series(path)
    usable = [series for series in found if series.stack is not None and not series.problem]
    if len(usable) == 1:
        (only,) = usable
        refused = tuple(dict.fromkeys(f"left out beside it: {item.problem}" for item in found if item.problem))
        if only.stack is None:
            raise VolumeError(only.problem)
        return replace(only, stack=replace(only.stack, notes=only.stack.notes + refused))
    if usable:
        counts = ", ".join(f"{len(series.stack.slices)} slices" for series in usable if series.stack is not None)
        raise VolumeError(f"holds {len(usable)} DICOM volumes ({counts}); name the files or folder of one")
    if found:
        raise VolumeError("; ".join(dict.fromkeys(item.problem for item in found)))
    raise VolumeError("holds no volume: no DICOM, NIfTI, NRRD or MetaImage file")


def _only_volume(path: Path) -> tuple[Path, str]:
    """Return the path and format of the only volume: the path's own, or, of an archive, of a file in it.

    Raises:
        VolumeError: There is none, or there are several.
    """
    if is_packed_folder(path):
        if is_archive(path.name) and (problem := problem_of(path)):
            raise VolumeError(problem)
        named = [file for file in files_below(path) if volume_suffix(file.name) and not is_companion(file.name)]
        if not named:
            return path, "dicom"
        if len(named) > 1 or any(series.stack is not None for series in find_series(path)):
            raise VolumeError(f"holds {len(named)} volume files and maybe DICOM; name one, as if the archive were a folder")
        path = named[0]
    return path, _format(path)


def _format(path: Path) -> str:
    if path.is_dir():
        return "dicom"
    if archive_of(path) is None and not path.is_file():
        raise VolumeError("does not exist")
    format = sniff_format(path)
    if format is not None:
        return format
    try:
        head = read_head(path)
    except OSError as error:
        raise VolumeError(f"file cannot be read: {cause_without_path(error)}") from error
    if looks_like_dicom(head):
        return "dicom"
    named = volume_suffix(path.name)
    raise VolumeError(f"named {named} and holds none" if named else "is of no format that is read as a volume")


def _files(path: Path) -> Iterator[Path]:
    for file in files_below(path):
        if file == path or not (is_companion(file.name) or volume_suffix(file.name)):
            yield file


def _header(file: Path, root: Path) -> DicomHeader | None:
    try:
        if problem_of(file) or (archive_of(file) is None and not file.is_file()) or not looks_like_dicom(read_head(file)):
            return None
        inside = file.name if file == root else file.relative_to(root).as_posix()
        return read_header(file, inside, "")
    except VolumeError:
        return None  # a file whose archive is damaged is no DICOM file any more
    except OSError as error:
        raise VolumeError(f"{file.name} cannot be read: {cause_without_path(error)}") from error
