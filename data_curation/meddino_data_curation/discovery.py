"""From sources to candidates: every file is looked at once, DICOM files are put together to series."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


@dataclass
class Discovery:
    """What lies under the sources.

    Attributes:
        candidates: Sorted by volume_id.
        files: How many files were seen, by what became of them.
    """

    candidates: list[Candidate] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)


def discover(sources: Sequence[SourceConfig], salt: Salt) -> Discovery:
    """Walk all sources.

    Raises:
        ConfigError: A source does not exist.
    """
    found = Discovery()
    for number, source in enumerate(sources):
        headers: list[DicomHeader] = []
        for file in find_files(source):
            _sort_in(file, number, source, salt, found, headers)
        found.candidates += group_series(headers, number, source, salt)
    found.candidates.sort(key=lambda candidate: candidate.volume_id)
    return found


def _sort_in(
    file: FoundFile, number: int, source: SourceConfig, salt: Salt, found: Discovery, headers: list[DicomHeader]
) -> None:
    suffix = volume_suffix(file.path.name)
    if suffix:
        found.files["volume file"] += 1
        found.candidates.append(file_candidate(file, number, source, salt, VOLUME_SUFFIXES[suffix]))
        return
    named_dicom = file.path.name.lower().endswith(_DICOM_SUFFIXES)
    if file.problem:
        if named_dicom or "folder" in file.problem:
            found.candidates.append(file_candidate(file, number, source, salt, "dicom"))
        found.files["unreadable"] += 1
        return
    if is_companion(file.path.name):
        found.files["other"] += 1
        return
    header = read_header(file.path, file.inside, file.stamp) if named_dicom or has_dicom_magic(file.path) else None
    if header is not None:
        found.files["DICOM file"] += 1
        headers.append(header)
    elif named_dicom:
        found.files["unreadable"] += 1
        damaged = FoundFile(file.path, file.inside, file.size, file.mtime_ns, "file is named as DICOM and is none, or damaged")
        found.candidates.append(file_candidate(damaged, number, source, salt, "dicom"))
    else:
        found.files["other"] += 1
