"""Held-out data: lists of ids or paths, and folders of volumes whose scans must not come in."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from meddino.core.errors import ConfigError
from meddino_data_curation.candidates import Candidate, find_files, patient_keys, volume_suffix
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.privacy import Salt

_LIST_SUFFIXES = {".txt", ".csv", ".tsv", ".lst", ".list"}
_MAX_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class Exclusions:
    """What must not come in.

    Attributes:
        lines: Of all lists: patient ids, series UIDs, volume ids, paths or file names.
        data: Folders and files of held-out volumes.
        stamp: Differs when anything of it has changed.
    """

    lines: frozenset[str]
    data: tuple[SourceConfig, ...]
    stamp: str


def read_exclusions(paths: Sequence[Path], named: Sequence[SourceConfig] = ()) -> Exclusions:
    """Sort held-out things into lists and data.

    Args:
        paths: Lists, folders of volumes, files or corpora.
        named: Held-out data that has a name already.

    Raises:
        ConfigError: One does not exist, or a list is no text.
    """
    lines: set[str] = set()
    data: list[SourceConfig] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"--exclude {path}: no such file or folder")
        if path.is_file() and path.suffix.lower() in _LIST_SUFFIXES:
            lines |= _lines(path)
            continue
        data.append(SourceConfig(name=f"excluded-{len(data) + 1}", path=path))
    data += named
    digest = hashlib.sha256()
    for source in data:
        for file in find_files(source):
            digest.update(f"{file.stamp}\n".encode("utf-8", "surrogateescape"))
    digest.update("\n".join(sorted(lines)).encode("utf-8", "surrogateescape"))
    return Exclusions(frozenset(lines), tuple(data), digest.hexdigest())


def _lines(path: Path) -> set[str]:
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ConfigError(f"--exclude {path}: {path.stat().st_size} bytes are no list of ids")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--exclude {path}: a list is UTF-8 text with one id or path a line") from error
    cells = (line.split("\t")[0].split(",")[0].strip().strip('"') for line in text.splitlines())
    return {cell for cell in cells if cell and not cell.startswith("#")}


def apply_lists(candidates: Sequence[Candidate], exclusions: Exclusions, config: CurationConfig, salt: Salt) -> list[Candidate]:
    """Refuse the candidates that a list names, before anything of them is read."""
    if not exclusions.lines:
        return list(candidates)
    series = {salt.key("series", line) for line in exclusions.lines}
    patients = {key for line in exclusions.lines for source in config.sources for key in patient_keys(salt, source.name, line)}
    named = []
    for candidate in candidates:
        path = PurePosixPath(candidate.place)
        suffix = volume_suffix(path.name) or ""
        stem = path.name[: len(path.name) - len(suffix)]
        words = {candidate.volume_id, candidate.place, path.name, stem, stem.removesuffix("_0000")}
        hit = words & exclusions.lines or candidate.series_key in series or candidate.patient_key in patients
        named.append(replace(candidate, problem="held out: named by an exclusion list") if hit else candidate)
    return named
