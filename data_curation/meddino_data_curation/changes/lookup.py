"""What an id, a path or a volume id means in a finished corpus, and who has seen it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from meddino.core.errors import ConfigError
from meddino.data.overlap import VOLUMES_FILE, content_key
from meddino_data_curation.changes.edition import Edition
from meddino_data_curation.changes.tombstones import erased_content, erased_patient
from meddino_data_curation.held_out.exclusion_lists import file_names
from meddino_data_curation.sources.patient_ids import key_everywhere, key_inside


@dataclass(frozen=True)
class Found:
    """What one name means.

    Attributes:
        name: As it was given.
        volumes: Rows of the volumes that it names.
        is_patient: Whether it is the patient's id of one of them.
        erased: Tombstones of it.
    """

    name: str
    volumes: tuple[dict[str, Any], ...]
    is_patient: bool
    erased: tuple[dict[str, Any], ...]


def find(edition: Edition, name: str) -> Found:
    """Find the volumes that a name means: a patient's id, a series or study UID, a volume id, a file or folder.

    Args:
        edition: The corpus; without its salt and private folder only volume ids are known.
        name: As somebody writes it.
    """
    patients = patient_keys(edition, name)
    others = {edition.salt.key(kind, name) for kind in ("series", "study")} if edition.salt is not None else set()
    by_path = _in_source_map(edition, name)
    volumes, erased, is_patient = [], [], False
    gone = {erased_patient(edition.salt, key) for key in patients} if edition.salt is not None else set()
    for row in edition.rows:
        if row["status"] == "erased":
            if row["patient_key"] in gone:
                erased.append(row)
            continue
        by_patient = row["patient_key"] in patients
        keys = {row["series_key"], row["study_key"]} - {None}
        if by_patient or keys & others or row["volume_id"] == name or row["volume_id"] in by_path:
            volumes.append(row)
            is_patient |= by_patient
    return Found(name, tuple(volumes), is_patient, tuple(erased))


def patient_keys(edition: Edition, name: str) -> set[str]:
    """Return the keys that a patient's id has in a corpus: among all sources, and inside each."""
    if edition.salt is None:
        return set()
    inside = {key_inside(edition.salt, source, name) for source in edition.source_names}
    return {key_everywhere(edition.salt, name), *inside}


def with_copies(rows: Sequence[dict[str, Any]], chosen: Iterable[str]) -> set[str]:
    """Return volumes and all copies of their scans, by id."""
    ids = set(chosen)
    scans = {key for row in rows if row["volume_id"] in ids for key in _scan(row)}
    return ids | {row["volume_id"] for row in rows if row["status"] != "erased" and scans & _scan(row)}


def _scan(row: dict[str, Any]) -> set[str]:
    """Return what all copies of one scan share."""
    return {key for key in (row["content_hash"], row["duplicate_of"] or row["volume_id"]) if key}


def _in_source_map(edition: Edition, name: str) -> set[str]:
    """Return the volumes whose file has that name, lies there or below it; a source's own name may stand in front."""
    path = PurePosixPath(name.replace("\\", "/").strip("/"))
    wanted, found = str(path), set()
    for volume_id, source, place in edition.entries:
        # A DICOM series is described: "series UID (part), 8 files, first: a/b/IM0001".
        inside = PurePosixPath(place.partition("first: ")[2] or place)
        places = {str(inside), *(str(folder) for folder in inside.parents if str(folder) != ".")}
        names = set(file_names(inside.name)) if "first: " not in place else set()
        longer = any(wanted == f"{source}/{one}" or wanted.endswith(f"/{one}") for one in (str(inside),))
        if wanted in places | names or longer:
            found.add(volume_id)
    return found


def why(edition: Edition, name: str) -> list[str]:
    """Return what became of a file, a patient or a volume, a line each; for the owner's eyes.

    Raises:
        ConfigError: The corpus knows nothing of that name.
    """
    found = find(edition, name)
    places = {volume_id: f"{source}/{place}" for volume_id, source, place in edition.entries}
    lines = [f"{places.get(row['volume_id'], row['volume_id'])}: {_fate(row, places)}" for row in found.volumes]
    lines += [f"{name}: erased from this corpus" for _ in found.erased[:1]]
    if not lines:
        known = "" if edition.entries else "; its private folder is not at hand, so only volume ids are known"
        raise ConfigError(f"{edition.corpus.root} knows no '{name}': no patient, series, study, volume or file{known}")
    return sorted(lines)


def _fate(row: dict[str, Any], places: dict[str, str]) -> str:
    if row["status"] == "accepted":
        left_out = "; ".join(f"{count} slices left out: {reason}" for reason, count in sorted(row["slices_left_out"].items()))
        return f"kept, {row['num_slices_kept']} slices, volume {row['volume_id']}" + (f"; {left_out}" if left_out else "")
    if row["status"] == "duplicate":
        kept = places.get(row["duplicate_of"], row["duplicate_of"])
        return f"duplicate ({row['duplicate_kind']}) of {kept}, volume {row['volume_id']}"
    return f"refused: {row['reason']}, volume {row['volume_id']}"


@dataclass(frozen=True)
class Sighting:
    """Something whose data hold a patient.

    Attributes:
        kind: "corpus", "run" or "model".
        path: Its folder.
        volumes: How many of the patient's volumes are known of it.
        note: How sure that is.
    """

    kind: str
    path: Path
    volumes: int
    note: str = ""


def who_saw(editions: Sequence[Edition], names: Sequence[str], folders: Sequence[Path]) -> list[Sighting]:
    """Name every corpus that holds a patient, and every run and export that learnt from one, also before it was erased.

    Args:
        editions: Corpora that may hold the patient, with their salts.
        names: Ids of the patient, or of several.
        folders: Runs and exports, or folders above them.

    Raises:
        ConfigError: A folder does not exist.
    """
    seen: list[Sighting] = []
    contents: set[str] = set()
    graves: dict[str, Edition] = {}
    for edition in editions:
        found = [find(edition, name) for name in names]
        ids = with_copies(edition.rows, (row["volume_id"] for one in found for row in one.volumes))
        rows = {row["volume_id"]: row for row in edition.rows if row["volume_id"] in ids}
        inside = [row for row in rows.values() if row["status"] in ("accepted", "duplicate")]
        contents |= {content_key(row["content_hash"]) for row in inside if row["content_hash"]}
        erased = [row for one in found for row in one.erased]
        graves.update({row["content_hash"]: edition for row in erased if row["content_hash"]})
        if rows or erased:
            note = f"{len(erased)} were erased" if erased else ""
            others = len(rows) - len(inside)
            note = "; ".join(filter(None, (note, f"{others} more were refused" if others else "")))
            seen.append(Sighting("corpus", edition.corpus.root, len(inside), note))
    for path in _volume_lists(folders):
        keys = set(path.read_text(encoding="utf-8", errors="replace").split())
        count = len(keys & contents) + sum(_is_grave(key, graves) for key in keys - contents)
        if count:
            kind = "model" if (path.parent / "config.json").is_file() else "run"
            seen.append(Sighting(kind, path.parent, count))
    return seen


def _volume_lists(folders: Sequence[Path]) -> list[Path]:
    """Return the lists of training volumes in and below the folders, each file once."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        for path in sorted({*folder.glob(VOLUMES_FILE), *folder.glob(f"**/{VOLUMES_FILE}")}):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _is_grave(key: str, graves: dict[str, Edition]) -> bool:
    return any(
        edition.salt is not None and graves.get(erased_content(edition.salt, key)) is edition
        for edition in {id(edition): edition for edition in graves.values()}.values()
    )
