"""Lists of held-out ids and paths: what a line may mean, which volumes it names, and which lines name none."""

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from meddino.core import tables
from meddino.volumes.file_kinds import volume_suffix
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.patient_ids import key_everywhere, key_inside

LIST_SUFFIXES = {".txt", ".csv", ".tsv", ".lst", ".list"}
TABLES = {".csv": ",;\t", ".tsv": "\t"}
_MAX_LIST_BYTES = 64 << 20
_LOOKED_AT = 1000  # lines


@dataclass(frozen=True)
class ExclusionList:
    """One list.

    Attributes:
        name: "list-1", ...: what the corpus calls it.
        path: The file.
        lines: Without comments and blank ones.
    """

    name: str
    path: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class ListOutcome:
    """What a list did.

    Attributes:
        name: Of the list.
        entry: What corpus.json records: counts and a salted hash; a plain one would give short ids away.
        unmatched: Lines that name nothing in the sources; for the owner's eyes.
        volumes: Ids of the volumes that it names.
    """

    name: str
    entry: dict[str, Any]
    unmatched: tuple[str, ...]
    volumes: frozenset[str]


def read_list(path: Path, name: str) -> ExclusionList:
    """Read a list: an id or path a line, in .csv and .tsv in the first column; lines that begin with # are comments.

    Raises:
        ConfigError: It is no text, or far too large for a list.
    """
    lines = tables.read_list(path, _MAX_LIST_BYTES)
    return ExclusionList(name, path, tuple(line for line in lines if not line.startswith("#")))


def match_lists(
    lists: Sequence[ExclusionList], candidates: Sequence[Candidate], sources: Sequence[SourceConfig], salt: Salt
) -> tuple[set[str], list[ListOutcome]]:
    """Find the volumes that lists name.

    Args:
        lists: Of held-out things.
        candidates: All of all sources.
        sources: Where they come from.
        salt: For keys of patients, studies and series.

    Returns:
        Ids of the volumes, and what became of each list.
    """
    named: set[str] = set()
    outcomes = []
    for item in lists:
        index = _LineIndex(item, sources, salt)
        volumes, matched = set(), set()
        for candidate in candidates:
            hits = index.hits(candidate)
            if hits:
                volumes.add(candidate.volume_id)
                matched |= hits
        named |= volumes
        digest = salt.key("exclusion list", *item.lines)
        entry = {
            "name": item.name, "lines": len(item.lines), "matched": len(matched), "volumes": len(volumes), "hash": digest
        }  # fmt: skip
        unmatched = tuple(line for number, line in enumerate(item.lines) if number not in matched)
        outcomes.append(ListOutcome(item.name, entry, unmatched, frozenset(volumes)))
    return named, outcomes


@dataclass
class _LineIndex:
    """Line numbers by everything that a line may mean."""

    item: ExclusionList
    sources: Sequence[SourceConfig]
    salt: Salt
    words: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    inside: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # below a source, or with its name in front
    absolute: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    keys: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        for number, line in enumerate(self.item.lines):
            for text in meanings(line, TABLES.get(self.item.path.suffix.lower(), "")):
                self._add(text, number)
        # Both the folder as it was named and the folder behind links: a list may have been written with either.
        self.roots = [
            (os.path.abspath(source.path), os.path.realpath(source.path))  # noqa: PTH100 - links stay as they are
            for source in self.sources
        ]
        self._in_folder = cache(self._folder_hits)

    def _add(self, text: str, number: int) -> None:
        for word in file_names(text):
            self.words[word].add(number)
        for kind in ("series", "study"):
            self.keys[self.salt.key(kind, text)].add(number)
        self.keys[key_everywhere(self.salt, text)].add(number)
        for source in self.sources:
            self.keys[key_inside(self.salt, source.name, text)].add(number)
        for path in {text, text.replace("\\", "/")}:
            place = posixpath.normpath(os.path.expanduser(path))  # noqa: PTH111 - a text, perhaps no path at all
            if place in (".", ".."):
                continue
            self.inside[place].add(number)
            for folder in (".", self.item.path.parent):  # the working folder, the list's own
                whole = os.path.abspath(os.path.join(folder, place))  # noqa: PTH100, PTH118
                self.absolute[whole].add(number)
                if "\0" not in whole:
                    self.absolute[_composed(os.path.realpath(whole))].add(number)

    def hits(self, candidate: Candidate) -> set[int]:
        """Return the lines that name a volume."""
        source = candidate.source
        found: set[int] = set()
        for key in (candidate.series_key, candidate.study_key, candidate.patient_key):
            found |= self.keys.get(key or "", set())
        for word in _words(candidate):
            found |= self.words.get(word, set())
        root = self.sources[source].path
        for path in candidate.files:
            inside = PurePosixPath(_composed(path.name if path == root else path.relative_to(root).as_posix()))
            names = [inside.name] if candidate.format == "dicom" else list(file_names(inside.name))
            folder = "" if str(inside.parent) == "." else str(inside.parent)
            found |= self._in_folder(source, folder)
            for name in names:
                found |= self._place_hits(source, f"{folder}/{name}" if folder else name)
        return found

    def _folder_hits(self, source: int, folder: str) -> frozenset[int]:
        """Return the lines that name a folder, or one above it up to the source itself."""
        found = self._place_hits(source, "")
        parts = folder.split("/") if folder else []
        for depth in range(1, len(parts) + 1):
            found |= self._place_hits(source, "/".join(parts[:depth]))
        return frozenset(found)

    def _place_hits(self, source: int, place: str) -> set[int]:
        base = _composed(Path(self.roots[source][0]).name)
        found: set[int] = set()
        for root in dict.fromkeys(self.roots[source]):
            is_file = place == PurePosixPath(root).name and self.sources[source].path.is_file()
            found |= self.absolute.get(_composed(root if is_file or not place else f"{root}/{place}"), set())
        if place:
            found |= self.inside.get(place, set()) | self.inside.get(f"{base}/{place}", set())
        return found


def meanings(line: str, separators: str) -> Iterator[str]:
    """Yield what a line may say: all of it, its first cell, what stands before a comment."""
    texts = [line, *(tables.first_cell(line, separator) for separator in separators)]
    texts += [text.split(" #")[0] for text in texts]
    for text in dict.fromkeys(_composed(text.strip().strip('"').strip()) for text in texts):
        if text:
            yield text


def _words(candidate: Candidate) -> Iterator[str]:
    yield candidate.volume_id
    yield _composed(candidate.source_path)
    if candidate.format != "dicom":  # a DICOM file is IM0001 in every folder
        yield from file_names(_composed(PurePosixPath(candidate.source_path).name))


def file_names(name: str) -> Iterator[str]:
    """Yield a file's name with and without its ending, with and without nnU-Net's channel."""
    yield name
    suffix = volume_suffix(name) or ""
    stem = name[: len(name) - len(suffix)]
    yield stem
    if stem.endswith("_0000"):
        yield stem.removesuffix("_0000")
        yield stem.removesuffix("_0000") + name[len(name) - len(suffix) :]


def _composed(text: str) -> str:
    """Return a text with accents composed: file systems and spreadsheets differ in it."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def count_existing(outcome: ListOutcome) -> int:
    """Return how many lines that name nothing in the sources are files or folders elsewhere."""
    some = (line for line in outcome.unmatched[:_LOOKED_AT] if "/" in line and "\0" not in line)
    return sum(os.path.exists(os.path.expanduser(line)) for line in some)  # noqa: PTH110, PTH111


def unmatched_text(outcomes: Sequence[ListOutcome], lists: Mapping[str, Path]) -> str:
    """Return the lines that name nothing, for a file in the private folder."""
    return "".join(f"{outcome.name} ({lists[outcome.name]}): {line}\n" for outcome in outcomes for line in outcome.unmatched)
