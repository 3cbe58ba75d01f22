"""From sources to candidates: every file is looked at once, DICOM files are put together to series."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.channels import case_names
from meddino.volumes.dicom.headers import DicomHeader, read_header
from meddino.volumes.file_kinds import (
    VOLUME_SUFFIXES,
    has_dicom_magic,
    is_companion,
    looks_like_dicom,
    read_head,
    unpacked_head,
    volume_format,
    volume_suffix,
    why_not_read,
)
from meddino.volumes.formats.nifti import GZIP_ERRORS
from meddino.volumes.pictures import (
    ARRAYS_SUFFIX,
    PICTURE_ERRORS,
    PictureArrays,
    find_picture_arrays,
    is_picture,
    is_picture_arrays,
)
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.progress import progress
from meddino_data_curation.sources.candidates import (
    Candidate,
    FoundFile,
    file_candidate,
    find_files,
)
from meddino_data_curation.sources.dicom_series import dicom_candidates
from meddino_data_curation.worker_pool import in_processes

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MANY_FILES = 2000  # headers take 0.7 ms each, starting processes a second
_VOLUME_FORMATS = "DICOM, NIfTI, NRRD, MHA or MHD"
_UNUSED = ("unreadable: ", "not read: ")


@dataclass
class Discovery:
    """What lies under the sources.

    Attributes:
        candidates: Sorted by volume_id.
        files: How many files were seen, by what became of them: "volume file", "DICOM file", "other", or, of what may have
            been meant as a volume or slice, "unreadable: " and "not read: " with the reason.
    """

    candidates: list[Candidate] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)

    @property
    def unused(self) -> Counter[str]:
        """How many files may have been meant as a volume or slice and are none, by reason."""
        return Counter({kind: count for kind, count in self.files.items() if kind.startswith(_UNUSED)})

    def told(self) -> str:
        """Return that for people."""
        return "; ".join(f"{count} x {kind}" for kind, count in self.unused.most_common())


@dataclass(frozen=True)
class _Look:
    """What a file's first bytes, and DICOM's header, say.

    Attributes:
        header: Of a DICOM file.
        format: Of a volume whose name does not tell.
        problem: Why a DICOM file is of no use.
        not_read: Which format it has, if that is none that is read.
    """

    header: DicomHeader | None = None
    format: str | None = None
    problem: str = ""
    not_read: str = ""


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
        sorting = _Sorting(number, source, salt, found)
        unknown = [file for file in find_files(source) if not sorting.takes(file)]
        for file, look in zip(unknown, _looks(unknown, workers), strict=True):
            sorting.add(file, look)
        sorting.finish()
    found.candidates.sort(key=lambda candidate: candidate.volume_id)
    return found


def nothing_found(sources: Sequence[SourceConfig], found: Discovery) -> str:
    """Say what was looked for in vain under sources, in the words of their modality.

    Args:
        sources: That hold nothing which may be a volume or a picture.
        found: There.
    """
    looked_for = {source.modality for source in sources}
    with_pictures = any(source.takes_pictures for source in sources)
    modality = looked_for.pop() if len(looked_for) == 1 else "auto"
    volume = "volume" if modality in ("auto", "image") else f"{modality.upper()} volume"
    what = "picture" if modality == "image" else f"{volume} or picture" if with_pictures else volume
    formats = "DICOM, NIfTI, NRRD, MHA, MHD, PNG, JPEG, TIFF, BMP, WebP or npz" if with_pictures else _VOLUME_FORMATS
    where = ", ".join(str(source.path) for source in sources)
    told = f" ({found.told()})" if found.unused else ""
    return f"no {what} under {where}: {found.files.total()} files, none of them {formats}{told}"


class _Sorting:
    """The files of one source on their way to candidates."""

    def __init__(self, number: int, source: SourceConfig, salt: Salt, found: Discovery) -> None:
        self.number, self.source, self.salt, self.found = number, source, salt, found
        self.headers: list[DicomHeader] = []
        self.broken: list[FoundFile] = []
        self.volumes: list[tuple[FoundFile, str]] = []

    def takes(self, file: FoundFile) -> bool:
        """Take a file whose name or state says what it is; False for one that has to be opened."""
        suffix = volume_suffix(file.path.name)
        if self.source.takes_pictures and is_picture(file.path.name):
            self._volume(file, "picture")
        elif self.source.takes_pictures and is_picture_arrays(file.path.name):
            self._arrays(file)
        elif is_companion(file.path.name):  # first: macOS puts a "._scan.nii.gz" beside each scan.nii.gz
            self.found.files["DICOMDIR (not needed)" if file.path.name == "DICOMDIR" else "other"] += 1
        elif suffix:
            self._volume(file, VOLUME_SUFFIXES[suffix])
        elif file.problem:
            self._broken(file)
        else:
            return False
        return True

    def add(self, file: FoundFile, look: _Look) -> None:
        """Take a file that was opened."""
        if look.header is not None:
            self.found.files["DICOM file"] += 1
            self.headers.append(look.header)
        elif look.format is not None:
            self._volume(file, look.format)
        elif look.problem:
            self._broken(replace(file, problem=look.problem))
        else:
            self.found.files[f"not read: {look.not_read}" if look.not_read else "other"] += 1

    def finish(self) -> None:
        """Make candidates of the volumes, of the DICOM files, and of what was broken among them."""
        self.found.candidates += self._volumes()
        folders = {PurePosixPath(header.inside).parent for header in self.headers}
        for file in self.broken:
            # An empty file anywhere may be anything; one in a folder of DICOM files was a slice.
            is_slice = PurePosixPath(file.inside).parent in folders and not why_not_read(file.path.name)
            if is_slice or _is_named_dicom(file) or "folder" in file.problem or "DICOM" in file.problem:
                self.found.candidates.append(file_candidate(file, self.number, self.source, self.salt, "dicom"))
        self.found.candidates += dicom_candidates(self.headers, self.number, self.source, self.salt)

    def _arrays(self, file: FoundFile) -> None:
        """Make candidates of the pictures in the arrays of a file; a single one is named by its file."""
        self.found.files["volume file"] += 1
        make = partial(file_candidate, source_number=self.number, source=self.source, salt=self.salt, format="picture")
        problem, arrays = file.problem, PictureArrays((), 0)
        try:
            if not problem:
                arrays = find_picture_arrays(file.path)
                problem = "" if arrays.keys else "none of its arrays holds pictures"
        except VolumeError as error:
            problem = str(error)
        except (OSError, *PICTURE_ERRORS):
            problem = "arrays cannot be read: the file is truncated or damaged, or holds objects"
        if problem:
            self.found.candidates.append(make(replace(file, problem=problem)))
        case = _stem(file) if len(arrays.keys) == 1 else ""
        notes = (f"arrays beside it that hold no pictures: {arrays.others}",) if arrays.others else ()
        self.found.candidates += [replace(make(file, case=case, key=key), notes=notes) for key in arrays.keys]

    def _volume(self, file: FoundFile, format: str) -> None:
        self.found.files["volume file"] += 1
        self.volumes.append((file, format))

    def _volumes(self) -> Iterator[Candidate]:
        """Yield the candidates of volume files: which digits of a name number channels only all names of a folder tell."""
        stems: dict[PurePosixPath, list[str]] = defaultdict(list)
        for file, _ in self.volumes:
            stems[PurePosixPath(file.inside).parent].append(_stem(file))
        cases = {folder: case_names(names) for folder, names in stems.items()}
        for file, format in self.volumes:
            case = cases[PurePosixPath(file.inside).parent][_stem(file)]
            yield file_candidate(file, self.number, self.source, self.salt, format, case)

    def _broken(self, file: FoundFile) -> None:
        self.found.files[f"unreadable: {file.problem}"] += 1
        self.broken.append(file)


def _stem(file: FoundFile) -> str:
    name = PurePosixPath(file.inside).name
    return name[: len(name) - len(volume_suffix(name) or (ARRAYS_SUFFIX if is_picture_arrays(name) else ""))]


def _is_named_dicom(file: FoundFile) -> bool:
    return file.path.name.lower().endswith(_DICOM_SUFFIXES)


def _looks(files: Sequence[FoundFile], workers: int) -> Iterator[_Look]:
    """Look at files in their order."""
    with progress("reading DICOM headers", len(files)) as advance:
        for look in in_processes(_look, files, workers if len(files) >= _MANY_FILES else 1):
            advance()
            yield look


def _look(file: FoundFile) -> _Look:
    try:
        head = read_head(file.path)
        if _is_named_dicom(file) or looks_like_dicom(head):
            return _dicom(file, head)
        reason = why_not_read(file.path.name)
        if reason:
            return _Look(not_read=reason)
        unpacked = unpacked_head(file.path, head)
    except GZIP_ERRORS:
        return _Look()  # whatever it was, it is not known by its name either
    except (VolumeError, OSError) as error:
        why = cause_without_path(error) if isinstance(error, OSError) else str(error)
        return _Look(problem=f"file cannot be read: {why}")
    format = volume_format(unpacked or head)
    if unpacked is not None and (format in ("nrrd", "metaimage") or has_dicom_magic(unpacked)):
        return _Look(not_read="an archive, or packed")
    return _Look(format=format)


def _dicom(file: FoundFile, head: bytes) -> _Look:
    header = read_header(file.path, file.inside, file.modified)
    if header is not None:
        return _Look(header=header)
    if has_dicom_magic(head):
        return _Look(problem="DICOM: header is truncated or damaged")
    return _Look(problem="file is named as DICOM and is none, or damaged") if _is_named_dicom(file) else _Look()
