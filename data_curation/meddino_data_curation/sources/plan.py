"""`meddino-curate plan`: which sets of the registry lie under a root, what of them is missing, and a config to curate them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.core.tables import read_table
from meddino_data_curation.config import LicencesConfig, SourceConfig
from meddino_data_curation.sources.candidates import find_files
from meddino_data_curation.sources.licences import needs_decision
from meddino_data_curation.sources.path_globs import escaped, glob_pattern
from meddino_data_curation.sources.registry import HeldOutTable, PartEntry, SetEntry

_MAX_TABLE_BYTES = 64 << 20


@dataclass
class FoundPart:
    """What lies there of a part of a set.

    Attributes:
        entry: The part.
        volumes: Paths that stand for one volume each: a file, or a folder of one.
        globs: They match its files, below the set's base.
    """

    entry: PartEntry
    volumes: set[str] = field(default_factory=set)
    globs: set[str] = field(default_factory=set)


@dataclass
class FoundSet:
    """What lies there of a set.

    Attributes:
        entry: The set.
        base: Folder that its globs count from.
        parts: In the registry's order.
        held_out_ids: Named as test volumes by the set's own table.
        held_out_globs: They match these volumes, below the base.
    """

    entry: SetEntry
    base: Path
    parts: list[FoundPart]
    held_out_ids: list[str] = field(default_factory=list)
    held_out_globs: list[str] = field(default_factory=list)

    @property
    def volumes(self) -> int:
        """How many volumes lie there."""
        return sum(len(part.volumes) for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing of what is known to belong to it."""
        return all(len(part.volumes) >= (part.entry.volumes or 1) for part in self.parts)


class PlannedConfig(StrictConfig):
    """What `plan --out` writes: the part of a curation's config that says what is read."""

    sources: tuple[SourceConfig, ...]
    """Sets of volumes."""
    held_out: tuple[SourceConfig, ...]
    """Their own test data."""
    licences: LicencesConfig


def find_sets(root: Path, registry: Sequence[SetEntry], places: Mapping[str, Path]) -> list[FoundSet]:
    """Look for every set of a registry; only names of files are read, and the sets' own split tables.

    Args:
        root: Folder under which sets lie, each in a folder named as its entry says, at any depth.
        registry: The sets.
        places: By name: where a set lies whose folder is named otherwise.

    Raises:
        ConfigError: The root or a place does not exist, or a place names no set.
    """
    unknown = set(places) - {entry.name for entry in registry}
    if unknown:
        names = ", ".join(entry.name for entry in registry)
        raise ConfigError(f"--at {min(unknown)}: no such set in the registry; its sets: {names}")
    found = [FoundSet(entry, places.get(entry.name, root), [FoundPart(part) for part in entry.parts]) for entry in registry]
    under_root = [item for item in found if item.entry.name not in places]
    _sort_in(root, under_root, named=True)
    for item in found:
        if item.entry.name in places:
            _sort_in(item.base, [item], named=False)
        _read_held_out(item)
    return found


def _sort_in(base: Path, sets: Sequence[FoundSet], named: bool) -> None:
    """Walk a folder once and give every file to the parts it belongs to."""
    walked = SourceConfig(name="plan", path=base)
    homes: dict[tuple[str, ...], list[list[str]]] = {}
    for file in find_files(walked, in_archives=False):
        folders = PurePosixPath(file.inside).parts[:-1]
        if folders not in homes:
            homes[folders] = [_homes(item.entry, base.name, folders) if named else [""] for item in sets]
        for item, candidates in zip(sets, homes[folders], strict=True):
            for home in candidates:
                if _take(item, home, file.inside):
                    break


def _homes(entry: SetEntry, root_name: str, folders: tuple[str, ...]) -> list[str]:
    """Return the folders above a file, outermost first, that are named like the set; "" is the root itself."""
    patterns = [glob_pattern(glob, ignore_case=True) for glob in entry.folders]
    above = [root_name, *folders]
    return [
        "/".join(folders[:depth]) for depth, name in enumerate(above) if any(pattern.fullmatch(name) for pattern in patterns)
    ]


def _take(item: FoundSet, home: str, inside: str) -> bool:
    below = inside.removeprefix(f"{home}/") if home else inside
    start = f"{escaped(home)}/" if home else ""
    table = item.entry.held_out_table
    if table is not None and glob_pattern(table.file).fullmatch(below):
        item.held_out_ids += _read_ids(item.base / inside, table)
    for part in item.parts:
        if glob_pattern(part.entry.files).fullmatch(below):
            part.volumes.add(inside if part.entry.volume_is == "file" else inside.rpartition("/")[0])
            part.globs.add(start + part.entry.files)
            if table is not None:
                item.held_out_globs = sorted({*item.held_out_globs, start + table.volume})
            return True
    return False


def _read_ids(path: Path, table: HeldOutTable) -> list[str]:
    columns = (table.id_column, table.split_column)
    rows = read_table(path, columns, filled=columns[:1], separators=table.separator, max_bytes=_MAX_TABLE_BYTES).rows
    return [row[table.id_column] for row in rows if row[table.split_column] == table.held_out_value]


def _read_held_out(item: FoundSet) -> None:
    """Turn the ids of the set's own table into globs."""
    if not item.held_out_ids:
        item.held_out_globs = []
        return
    ids = "{" + ",".join(escaped(name) for name in sorted(set(item.held_out_ids))) + "}"
    item.held_out_globs = [glob.replace("{id}", ids) for glob in item.held_out_globs]


def undecided(found: Sequence[FoundSet], allow: Sequence[str]) -> list[FoundSet]:
    """Return the sets that lie there and whose licence nobody has allowed by name yet."""
    return [
        item for item in found if item.volumes and needs_decision(item.entry.licence.id) and item.entry.licence.id not in allow
    ]


def planned_config(found: Sequence[FoundSet], allow: Sequence[str], with_test_data: bool) -> PlannedConfig:
    """Return the config that curates what lies there.

    Args:
        found: From `find_sets`.
        allow: `licences.allow`.
        with_test_data: Take the sets' own test data in, as the paper did, instead of holding it out.

    Raises:
        ConfigError: Nothing lies there, or a set's licence needs a decision.
    """
    there = [item for item in found if item.volumes]
    if not there:
        raise ConfigError("no set of the registry lies there; folders must be named as the registry says, or given with --at")
    needing = undecided(there, allow)
    if needing:
        which = "; ".join(f"{item.entry.name} ({item.entry.licence.id}: {item.entry.licence.kind})" for item in needing)
        ids = ", ".join(dict.fromkeys(item.entry.licence.id for item in needing))
        raise ConfigError(
            f"licences that forbid commercial use or are unclear: {which}; if you may use them, say licences.allow=[{ids}], "
            "or choose sets with --sets"
        )
    sources, held_out = [], []
    for item in there:
        table = item.entry.held_out_table
        if table is not None and not item.held_out_ids and not with_test_data:
            raise ConfigError(
                f"{item.entry.name}: {table.file} names its test volumes and is not there, or names none; "
                "put it there, or say --with-test-data"
            )
        used = [part for part in item.parts if part.volumes and (with_test_data or not part.entry.held_out)]
        kept_out = [] if with_test_data else [part for part in item.parts if part.volumes and part.entry.held_out]
        if used:
            sources.append(_source(item, item.entry.name, [glob for part in used for glob in part.globs]))
        globs = [glob for part in kept_out for glob in part.globs] + ([] if with_test_data else item.held_out_globs)
        if globs:
            held_out.append(_source(item, f"{item.entry.name}-test", globs))
    return PlannedConfig(sources=tuple(sources), held_out=tuple(held_out), licences=LicencesConfig(allow=tuple(allow)))


def _source(item: FoundSet, name: str, globs: Sequence[str]) -> SourceConfig:
    ordered = sorted(globs)
    return SourceConfig(
        name=name,
        path=Path(os.path.abspath(item.base)),  # noqa: PTH100 - links stay as they are, resolve() would follow them
        licence=item.entry.licence.id,
        modality=item.entry.modality,
        citation=item.entry.full_citation,
        preference=item.entry.preference,
        patient_pattern=item.entry.patient_pattern,
        include=ordered[0] if len(ordered) == 1 else "{" + ",".join(ordered) + "}",
    )
