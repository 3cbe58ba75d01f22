"""`meddino-curate add` and `merge` of finished corpora: volumes put in, each scan once, what must stay out kept out."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.core.logging import get_logger
from meddino_data_curation.changes.edition import Edition, SourceEntry, read_edition
from meddino_data_curation.changes.lookup import find
from meddino_data_curation.changes.revision import NextEdition, changing, write_next
from meddino_data_curation.changes.tombstones import refused_by_tombstones
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.build import build, check_out
from meddino_data_curation.corpus.work_folder import WorkFolder
from meddino_data_curation.held_out.comparison import audit_entry, unread_problem
from meddino_data_curation.held_out.exclusion_lists import TABLES, meanings
from meddino_data_curation.held_out.exclusions import read_exclusions
from meddino_data_curation.held_out.scan import scan
from meddino_data_curation.privacy import make_private, private_folder
from meddino_data_curation.selection.duplicates import (
    Overlap,
    exclude_overlaps,
    find_overlaps,
    mark_exact,
    mark_near,
    with_relatives,
)

ADDING = "adding"
_CURATED_ALIKE = ("hounsfield", "orientation", "slices", "inplane", "duplicates", "shards")
_logger = get_logger(__name__)
Row = dict[str, Any]


def add(root: Path, config: CurationConfig, salt_file: Path | None = None) -> dict[str, Any]:
    """Put the volumes of more sources into a finished corpus, by the rules it was curated by.

    What is in it already is not read again. Duplicates, held-out data (that of the build and what is named now) and
    tombstones count for old and new volumes alike; of a scan that comes twice the old one stays. Killed anywhere, the same
    command goes on.

    Args:
        root: The corpus.
        config: Sources to add, held-out data, workers; how to curate is the corpus's.
        salt_file: The corpus's salt; None takes `<corpus>.private/salt`.

    Returns:
        The content of corpus.json.

    Raises:
        ConfigError: A source is missing or its name is another source's, or the salt is not at hand.
        VolumeError: No new volume could be used.
    """
    with changing(root):
        edition = read_edition(root, salt_file)
        edition.need_salt()
        built = _built(root)
        config = _alike(config, edition, built)
        staging = private_folder(root) / ADDING
        make_private(staging)
        salt = staging / "salt"
        shutil.copyfile(_salt_path(root, built, salt_file), salt)
        salt.chmod(0o600)
        values = config.model_dump(mode="json")
        plain = {**values, "exclude": [], "held_out": [], "privacy": {"salt_file": str(salt)}}
        fresh = check_config(CurationConfig, plain, where="add")
        if not build(fresh, staging / "corpus", known=frozenset(row["volume_id"] for row in edition.rows)):
            shutil.rmtree(staging)
            _logger.info("%s: every volume of the sources is in it already; nothing to do", root)
            return edition.corpus.info
        editions = [edition, read_edition(staging / "corpus", salt)]
        info = _put_together(root, editions, _with_rules(config, built), "grown")
        _remember(root, built, config)
        shutil.rmtree(staging)
    return info


def merge_finished(parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put finished corpora together to a new one; duplicates across them are left out, tombstones count for all.

    Args:
        parts: Finished corpora, the first one's scans are preferred. They stay as they are.
        out: The new corpus.

    Raises:
        ConfigError: They were curated by different rules, or tombstones are there without their salt.
    """
    editions = [read_edition(part) for part in parts]
    inputs = {"inputs": [edition.corpus.content_hash for edition in editions]}
    note = private_folder(out) / "inputs.json"
    if (out / "corpus.json").is_file():
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == inputs:
            _logger.info("%s is finished already; nothing to do", out)
            return editions[0].corpus.info
        raise ConfigError(f"--out {out} is a finished corpus of other files or another config; name a new folder")
    if not WorkFolder(out).is_changing():
        check_out(out)
    with changing(out, is_new=True) as resumed:
        if resumed:
            return read_edition(out).corpus.info
        make_private(private_folder(out))
        _tell_of_shared_names(parts)
        write_json(note, inputs)
        first = editions[0]
        own = private_folder(parts[0]) / "salt"
        if own.is_file():
            shutil.copyfile(own, private_folder(out) / "salt")
            (private_folder(out) / "salt").chmod(0o600)
        return _put_together(out, [first, *(_with_salt_of(first, other) for other in editions[1:])], None, "merged")


def _tell_of_shared_names(parts: Sequence[Path]) -> None:
    """Warn of data sets whose name stands for different folders: slices carry that name, and it cannot be changed here."""
    places: dict[str, set[Path]] = {}
    for source in (source for part in parts for source in _built(part)["sources"]):
        places.setdefault(source["name"], set()).add(Path(source["path"]).resolve())
    for name in (name for name, folders in places.items() if len(folders) > 1):
        _logger.warning(
            "'%s' is %d folders in these corpora and becomes one data set, in which equal short patient ids are one patient; "
            "build them with --name to keep them apart",
            name, len(places[name]),
        )  # fmt: skip


def _with_salt_of(first: Edition, other: Edition) -> Edition:
    """Return an edition whose keys mean what the first one's mean; of another salt they mean nothing and are taken out."""
    if other.corpus.info.get("salt_fingerprint") == first.corpus.info.get("salt_fingerprint"):
        return other
    if any(row["status"] == "erased" for row in other.rows):
        raise ConfigError(
            f"{other.corpus.root} has tombstones of another salt than {first.corpus.root}: what was erased from it could come "
            "back unseen; build it again with the same privacy.salt_file"
        )
    _logger.warning(
        "%s has another salt than %s: its volumes are compared by content and look only, never by patient, study or series",
        other.corpus.root, first.corpus.root,
    )  # fmt: skip
    lost = {"patient_key": None, "series_key": None, "study_key": None, "patient_is_known": False, "patient_is_named": False}
    return Edition(other.corpus, [{**row, **lost} for row in other.rows], other.prints, other.entries, None)


def _built(root: Path) -> dict[str, Any]:
    path = private_folder(root) / "build.json"
    if path.is_file():
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    return {"sources": [], "exclude": [], "held_out": [], "exclusion": {}, "privacy": {"salt_file": None}}


def _salt_path(root: Path, built: dict[str, Any], salt_file: Path | None) -> Path:
    own = private_folder(root) / "salt"
    return salt_file or (own if own.is_file() else Path(built["privacy"]["salt_file"]))


def _alike(config: CurationConfig, edition: Edition, built: dict[str, Any]) -> CurationConfig:
    """Return the config with the corpus's rules, and with sources whose names mean one folder each."""
    recorded = edition.corpus.info["config"]
    places = {source["name"]: Path(source["path"]).resolve() for source in built["sources"]}
    names = {str(path): name for name, path in places.items()}
    taken = {*edition.source_names, *places}
    sources = []
    for source in config.sources:
        name = source.name
        if name in taken and places.get(name) != source.path.resolve():
            if not name.startswith("source-"):
                raise ConfigError(f"source '{name}' is another folder in {edition.corpus.root}; give this one its own --name")
            name = names.get(str(source.path.resolve())) or next(
                free for number in range(1, len(taken) + len(config.sources) + 2) if (free := f"source-{number}") not in taken
            )
        taken.add(name)
        sources.append(source.model_copy(update={"name": name}).model_dump(mode="json"))
    values = {**config.model_dump(mode="json"), **{key: recorded[key] for key in _CURATED_ALIKE if key in recorded}}
    return check_config(CurationConfig, {**values, "sources": sources}, where="add")


def _with_rules(config: CurationConfig, built: dict[str, Any]) -> CurationConfig:
    """Return the config with the held-out data of the build beside what is named now."""
    values = config.model_dump(mode="json")
    values["exclude"] = list(dict.fromkeys([*built["exclude"], *values["exclude"]]))
    known = {source["name"] for source in values["held_out"]}
    values["held_out"] += [source for source in built["held_out"] if source["name"] not in known]
    return check_config(CurationConfig, values, where="held-out data of the build")


def _remember(root: Path, built: dict[str, Any], config: CurationConfig) -> None:
    """Keep where the sources lie and what is held out, for the next time."""
    values = _with_rules(config, built).model_dump(mode="json")
    known = {source["name"] for source in values["sources"]}
    values["sources"] += [source for source in built["sources"] if source["name"] not in known]
    values["privacy"] = built["privacy"]
    write_json(private_folder(root) / "build.json", values)


def _put_together(out: Path, editions: Sequence[Edition], rules: CurationConfig | None, what: str) -> dict[str, Any]:
    """Write the corpus that holds all editions, each scan once."""
    rows = [{**row, "edition": number} for number, edition in enumerate(editions) for row in edition.rows]
    rows = _once(rows)
    came_back: set[str] = set()
    if editions[0].salt is not None:
        came_back = refused_by_tombstones(rows, rows, editions[0].salt)
    elif any(row["status"] == "erased" for row in rows):
        editions[0].need_salt()
    if came_back:
        _logger.warning("%d volumes were erased before and are refused", len(came_back))
        rows = [row for row in rows if row["volume_id"] not in came_back]
    prints = {name: value for edition in editions for name, value in edition.prints.items() if name not in came_back}
    recorded = editions[0].corpus.info["config"]
    preference = {source["name"]: source["preference"] for source in recorded["sources"]}
    if recorded["duplicates"]["exact"]:
        mark_exact(rows, preference)
    if recorded["duplicates"]["near"]:
        mark_near(rows, prints, preference)
    audits, lists = _rules_applied(out, editions, rows, prints, rules) if rules is not None else ([], _lists(editions))
    parents = [edition.corpus.content_hash for edition in editions[: 1 if what == "grown" else None]]
    history = [entry for edition in editions for entry in edition.corpus.info.get("history", [])]
    done = [{"what": what, "volumes": sum(row["edition"] > 0 for row in rows), "from": parent} for parent in parents]
    kept = {row["volume_id"] for row in rows if row["status"] == "accepted"}
    entries: dict[str, SourceEntry] = {}
    for entry in (entry for edition in editions for entry in edition.entries):
        entries.setdefault(entry[0], entry)
    wanted = NextEdition(
        rows=rows,
        prints={name: value for name, value in prints.items() if name in kept},
        entries=[entry for name, entry in entries.items() if name not in came_back],
        audits=audits,
        lists=lists,
        history=[*history, *done],
    )
    _withdrawn(editions, {entry["name"] for entry in audits})
    info = write_next(out, editions, wanted)
    totals = info["totals"]
    _logger.info(
        "%s: %d slices of %d volumes, %d refused, %d duplicates",
        out, totals["slices"], totals["accepted"], totals["rejected"], totals["duplicate"],
    )  # fmt: skip
    return info


def _once(rows: Sequence[Row]) -> list[Row]:
    """Return rows without those of a volume that an earlier edition has too."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["volume_id"], row)
    if len(first) < len(rows):
        _logger.info("%d volumes are in several of these corpora under one id and are taken once", len(rows) - len(first))
    return list(first.values())


def _lists(editions: Sequence[Edition]) -> list[dict[str, Any]]:
    return [entry for edition in editions for entry in edition.corpus.info.get("exclusion_lists", [])]


def _withdrawn(editions: Sequence[Edition], renewed: set[str]) -> None:
    for edition in editions:
        for entry in edition.corpus.info.get("audit", []):
            if entry["name"] not in renewed:
                _logger.warning(
                    "the audit of %s against %s says nothing of the other volumes and is withdrawn: run it again",
                    edition.corpus.root, entry["name"],
                )  # fmt: skip


def _rules_applied(
    out: Path, editions: Sequence[Edition], rows: list[Row], prints: dict[str, Any], rules: CurationConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Leave out, of old and new volumes, what is held out; return what corpus.json says of it."""
    exclusions = read_exclusions(rules)
    salt = editions[0].need_salt()
    entries = [entry for edition in editions for entry in edition.entries]
    whole = Edition(editions[0].corpus, rows, prints, entries, salt)
    lists = []
    for item in exclusions.lists:
        separators = TABLES.get(item.path.suffix.lower(), "")
        hits = {
            line: {row["volume_id"] for text in meanings(line, separators) for row in find(whole, text).volumes}
            for line in item.lines
        }
        named = set().union(*hits.values())
        overlaps = with_relatives(rows, [Overlap(name, -1, "exact") for name in sorted(named)])
        exclude_overlaps(rows, overlaps, "is named by an exclusion list")
        matched = sum(bool(volumes) for volumes in hits.values())
        _logger.info("exclusion %s: %d of %d lines match", item.name, matched, len(item.lines))
        digest = salt.key("exclusion list", *item.lines)
        counts = {"lines": len(item.lines), "matched": matched, "volumes": len(named), "unread": 0}
        lists.append({"name": item.name, **counts, "hash": digest})
    audits = []
    names = list(dict.fromkeys(name for edition in editions for name in edition.source_names))
    for source in exclusions.data:
        found = scan([source], rules, salt, names, private_folder(out) / ADDING / "held-out" / source.name)
        allowed = rules.exclusion.allow_unread
        if problem := unread_problem(f"held-out data '{source.name}'", found, allowed, "exclusion.allow_unread=true"):
            raise ConfigError(problem)
        overlaps = find_overlaps(rows, prints, found.rows, found.prints)
        left_out = exclude_overlaps(rows, overlaps)
        audits.append({**audit_entry(source.name, rows, prints, found, []), "left_out": left_out})
        _logger.info("%s: %d volumes left out, of old and new ones", source.name, left_out)
    return audits, lists
