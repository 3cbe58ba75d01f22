"""From sources to candidates: every file is looked at once, DICOM files are put together to series."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from meddino_data_curation.candidates import (
    VOLUME_SUFFIXES,
    Candidate,
    FoundFile,
    file_candidate,
    find_files,
    has_dicom_magic,
    is_companion,
    volume_suffix,
)
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.dicom_headers import DicomHeader, read_header
from meddino_data_curation.dicom_series import group_series
from meddino_data_curation.privacy import Salt
from meddino_data_curation.progress import progress
from meddino_data_curation.worker_pool import in_processes

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MANY_FILES = 2000  # headers take 0.7 ms each, starting processes a second


@dataclass
class Discovery:
    """What lies under the sources.

    Attributes:
        candidates: Sorted by volume_id.
        files: How many files were seen, by what became of them.
    """

    candidates: list[Candidate] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)


def discover(sources: Sequence[SourceConfig], salt: Salt, workers: int = 1) -> Discovery:
    """Walk all sources.

    Args:
        sources: Folders or files.
        salt: For the keys of patients, studies, series and volumes.
        workers: Processes that read DICOM headers, where there are many.

    Raises:
        ConfigError: A source does not exist.
        VolumeError: A process that read headers was ended by the system.
    """
    found = Discovery()
    for number, source in enumerate(sources):
        unknown = [file for file in find_files(source) if not _is_sorted_in(file, number, source, salt, found)]
        headers: list[DicomHeader] = []
        for file, header in zip(unknown, _headers(unknown, workers), strict=True):
            if header is not None:
                found.files["DICOM file"] += 1
                headers.append(header)
            elif _is_named_dicom(file):
                found.files["unreadable"] += 1
                damaged = replace(file, problem="file is named as DICOM and is none, or damaged")
                found.candidates.append(file_candidate(damaged, number, source, salt, "dicom"))
            else:
                found.files["other"] += 1
        found.candidates += group_series(headers, number, source, salt)
    found.candidates.sort(key=lambda candidate: candidate.volume_id)
    return found


def _is_sorted_in(file: FoundFile, number: int, source: SourceConfig, salt: Salt, found: Discovery) -> bool:
    """Take a file whose name or state says what it is; False for one that may be DICOM."""
    suffix = volume_suffix(file.path.name)
    if suffix:
        found.files["volume file"] += 1
        found.candidates.append(file_candidate(file, number, source, salt, VOLUME_SUFFIXES[suffix]))
    elif file.problem:
        if _is_named_dicom(file) or "folder" in file.problem:
            found.candidates.append(file_candidate(file, number, source, salt, "dicom"))
        found.files["unreadable"] += 1
    elif is_companion(file.path.name):
        found.files["other"] += 1
    else:
        return False
    return True


def _is_named_dicom(file: FoundFile) -> bool:
    return file.path.name.lower().endswith(_DICOM_SUFFIXES)


def _headers(files: Sequence[FoundFile], workers: int) -> Iterator[DicomHeader | None]:
    """Read the headers in the order of the files; None for what is no DICOM."""
    with progress("reading DICOM headers", len(files)) as advance:
        for header in in_processes(_header, files, workers if len(files) >= _MANY_FILES else 1):
            advance()
            yield header


def _header(file: FoundFile) -> DicomHeader | None:
    is_worth_it = _is_named_dicom(file) or has_dicom_magic(file.path)
    return read_header(file.path, file.inside, file.stamp) if is_worth_it else None
