"""What lies under the sources: files and DICOM series that may be volumes, before any pixel is read."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_members, archive_of, is_archive
from meddino.volumes.formats.voxel_files import VoxelFiles, find_voxel_files
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.path_globs import glob_pattern
from meddino_data_curation.sources.patient_ids import named_in_path, patient_id


@dataclass(frozen=True)
class Candidate:
    """One thing that may become a volume.

    Attributes:
        volume_id: Salted hash of where it comes from.
        source: Index into the config's sources.
        format: "nifti", "nrrd", "metaimage", "dicom" or "picture".
        files: Absolute paths, in a fixed order; of a header with files of voxels, the header comes first.
        source_path: What the private source map says: path inside the source, or the series.
        patient_key: Salted hash of the patient, or None where nothing tells.
        series_key: Salted hash of the DICOM series or of the file.
        study_key: Salted hash of the DICOM study, or None.
        modified: Sizes and times of the files: others mean they have to be read again.
        problem: Why it is refused without being read, or "".
        patient: The patient's id as written; only ever hashed with the salt.
        patient_is_known: Whether patient_key means the same person in every source.
        patient_is_named: Whether an id tells the patient; else patient_key stands for a study or a file.
        key: Of one picture among several in a file.
    """

    volume_id: str
    source: int
    format: str
    files: tuple[Path, ...]
    source_path: str
    patient_key: str | None
    series_key: str
    study_key: str | None = None
    modified: str = ""
    problem: str = ""
    notes: tuple[str, ...] = field(default=())
    patient: str = field(default="", repr=False)
    patient_is_known: bool = False
    patient_is_named: bool = False
    key: str = ""


@dataclass(frozen=True)
class FoundFile:
    """A file under a source.

    Attributes:
        path: Absolute path.
        inside: Path inside the source, with slashes.
        size: Bytes.
        mtime_ns: Time of the last change.
        problem: Why it cannot be read, or "".
    """

    path: Path
    inside: str
    size: int
    mtime_ns: int
    problem: str = ""

    @property
    def modified(self) -> str:
        """Differs when the file has changed."""
        return f"{self.inside}:{self.size}:{self.mtime_ns}"


def find_files(source: SourceConfig, in_archives: bool = True) -> Iterator[FoundFile]:
    """Walk a source in a fixed order; links are followed, loops of links are not.

    Args:
        source: A folder or a file.
        in_archives: Yield the files in an archive instead of the archive.

    Raises:
        ConfigError: The source does not exist or cannot be listed.
    """
    root = source.path
    if (archive := archive_of(root)) is not None and (packed := list(_below(root, archive))):
        yield from packed
        return
    if not root.exists():
        raise ConfigError(f"source '{source.name}': no such file or folder: {root}")
    if root.is_file():
        yield from _in_archive(_found(root, root.name), None) if in_archives else [_found(root, root.name)]
        return
    if not os.access(root, os.R_OK | os.X_OK):
        raise ConfigError(f"source '{source.name}': no permission to list {root}")
    pattern = None if source.include == "**/*" else glob_pattern(source.include)
    visited: set[tuple[int, int]] = set()
    unlisted: list[OSError] = []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unlisted.append):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:  # reached before, by another link
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            inside = path.relative_to(root).as_posix()
            if in_archives and is_archive(name):
                yield from _in_archive(_found(path, inside), pattern)
            elif pattern is None or pattern.fullmatch(inside):
                yield _found(path, inside)
    for error in unlisted:
        inside = Path(os.fsdecode(error.filename)).relative_to(root).as_posix()
        yield FoundFile(Path(root, inside), inside, 0, 0, "folder cannot be listed: no permission")


def file_candidate(
    found: FoundFile, source_number: int, source: SourceConfig, salt: Salt, format: str, case: str = "", key: str = ""
) -> Candidate:
    """Return the candidate of one volume file, or of one picture in a file of several.

    Args:
        found: The file.
        source_number: Index of its source.
        source: Where it lies.
        salt: For the keys.
        format: Of the file.
        case: Its name without ending and without the number of a channel; "" for a file whose name says nothing.
        key: Of the picture.
    """
    inside = f"{found.inside}#{key}" if key else found.inside
    voxel_files = _voxel_files(found, format)
    named = named_in_path(source.patient_pattern, found.inside)
    patient = named or case
    who = patient_id(salt, source.name, patient, "pattern" if named else "name", stand_in=inside)
    return Candidate(
        volume_id=salt.key("volume", source.name, inside),
        source=source_number,
        format=format,
        files=(found.path, *voxel_files.files),
        source_path=inside,
        patient_key=who.key,
        series_key=salt.key("series", source.name, inside),
        modified=found.modified + voxel_files.modified,
        problem=found.problem,
        patient=patient,
        patient_is_known=who.is_known,
        patient_is_named=who.is_named,
        key=key,
    )


def _voxel_files(found: FoundFile, format: str) -> VoxelFiles:
    """Return where the voxels lie that are not in the file itself; a header that is wrong is told of when it is read."""
    if format in ("nrrd", "metaimage") and not found.problem:
        with suppress(VolumeError, OSError):
            return find_voxel_files(found.path, format)
    return VoxelFiles((), "unknown")


def _below(root: Path, archive: Path) -> Iterator[FoundFile]:
    """Yield a file in an archive, or those of a folder in it."""
    return (found for found in _in_archive(_found(archive, archive.name), None) if root in (found.path, *found.path.parents))


def _in_archive(found: FoundFile, pattern: re.Pattern[str] | None) -> Iterator[FoundFile]:
    """Yield the files in an archive that a pattern takes, all if it takes the archive; itself where it has a problem."""
    if found.problem or not is_archive(found.path.name):
        yield found
        return
    try:
        members, problem = archive_members(found.path)
    except OSError as error:
        members, problem = [], f"file cannot be read: {cause_without_path(error)}"
    whole = pattern is None or pattern.fullmatch(found.inside)
    for member in members:
        inside = f"{found.inside}/{member.name}"
        if whole or (pattern is not None and pattern.fullmatch(inside)):
            empty = "file is empty" if member.size == 0 else ""
            yield FoundFile(found.path / member.name, inside, member.size, found.mtime_ns, member.problem or empty)
    if problem:
        yield replace(found, problem=problem)


def _found(path: Path, inside: str) -> FoundFile:
    try:
        status = path.stat()
    except OSError as error:
        return FoundFile(path, inside, 0, 0, f"file cannot be read: {cause_without_path(error)}")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        return FoundFile(path, inside, 0, 0, "file cannot be read: it is a pipe, a socket or a device")
    problem = "" if os.access(path, os.R_OK) else "file cannot be read: no permission"
    if not problem and status.st_size == 0:
        problem = "file is empty"
    return FoundFile(path, inside, status.st_size, status.st_mtime_ns, problem)
