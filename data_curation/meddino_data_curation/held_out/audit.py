"""`meddino-curate audit`: does a corpus hold anything of data that must stay unseen?"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.core.files import sha256_file, write_json, write_text
from meddino.core.logging import get_logger
from meddino.data.audits import audit_text, says_something
from meddino.data.corpus import Corpus
from meddino_data_curation.config import CurationConfig, SourceConfig, check_distinct, common_modality
from meddino_data_curation.corpus.manifests import REPORT, read_fingerprints
from meddino_data_curation.corpus.report import with_audits
from meddino_data_curation.held_out.comparison import audit_entry, unread_problem
from meddino_data_curation.held_out.exclusion_lists import LIST_SUFFIXES
from meddino_data_curation.held_out.scan import SALTED, HeldOutScan, scan
from meddino_data_curation.privacy import Salt, load_salt, private_folder
from meddino_data_curation.selection.duplicates import Overlap, find_overlaps
from meddino_data_curation.sources.patient_ids import RULES_VERSION

_logger = get_logger(__name__)


@dataclass(frozen=True)
class AuditResult:
    """What an audit against one data set found.

    Attributes:
        name: Of the data set.
        lines: One a overlap, for the owner's eyes: they name files.
        entry: What corpus.json records; names nobody.
        problem: Why it says less than it should, or "".
    """

    name: str
    lines: tuple[str, ...]
    entry: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class AuditOptions:
    """How data sets are understood.

    Attributes:
        salt_file: The corpus's salt; None takes `<corpus>.private/salt`. Without it patients cannot be compared.
        patient_pattern: Regex on a path inside a data set; its first group is the patient.
        same_ids: Patient ids mean the same there as in the corpus's sources, however short.
        allow_unread: Whether volumes may be there that cannot be read.
        workers: Processes; None takes one a core.
    """

    salt_file: Path | None = None
    patient_pattern: str = ""
    same_ids: bool = False
    allow_unread: bool = False
    workers: int | None = None


def audit(root: Path, against: Sequence[Path], names: Sequence[str], options: AuditOptions) -> list[AuditResult]:
    """Compare a corpus with data sets and record the results in its corpus.json.

    Args:
        root: The corpus.
        against: Folders of volumes, files, or other corpora.
        names: What they are called in the record, in their order; the rest are dataset-1, dataset-2, ...
        options: How they are understood.

    Returns:
        One a data set. One of which no volume could be read has a problem, and is not recorded.

    Raises:
        ConfigError: A data set is missing, a name is wrong, or the salt is another one.
        ShardError: It is no corpus.
    """
    corpus = Corpus(root)
    salt, hidden = _salt(corpus, options.salt_file)
    prints = read_fingerprints(root / "fingerprints.parquet")
    hidden_columns = {f"{kind}_key": None for kind in hidden}
    rows = [{**row, **hidden_columns} for row in corpus.volumes.to_pylist()]
    sources = _named(against, names, corpus, options)
    trained_on = [source["name"] for source in corpus.info["sources"]]
    results = []
    for source in sources:
        held_out = scan([source], _config_of(corpus, options.workers), salt, trained_on)
        overlaps = find_overlaps(rows, prints, held_out.rows, held_out.prints)
        entry = audit_entry(source.name, rows, prints, held_out, overlaps, hidden)
        problem = unread_problem(source.name, held_out, options.allow_unread, "--allow-unread")
        results.append(AuditResult(source.name, _lines(overlaps, held_out), entry, problem))
    _record(root, corpus.info, [result for result in results if says_something(result.entry)])
    return results


def _config_of(corpus: Corpus, workers: int | None) -> CurationConfig:
    """Return how the corpus recognised and turned volumes: read otherwise, equal scans would differ."""
    recorded = corpus.info["config"]
    values = {name: recorded[name] for name in ("hounsfield", "orientation") if name in recorded}
    return check_config(CurationConfig, {**values, "workers": workers}, where=f"{corpus.root / 'corpus.json'}: config")


def _named(against: Sequence[Path], names: Sequence[str], corpus: Corpus, options: AuditOptions) -> list[SourceConfig]:
    """Give every data set its name; unnamed ones never take the name, and so the record, of an earlier audit."""
    if len(names) > len(against):
        raise ConfigError(
            f"{len(names)} --name for {len(against)} data sets; names go to those after --against, in their order"
        )
    lists = [path for path in against if path.is_file() and path.suffix.lower() in LIST_SUFFIXES]
    if lists:
        raise ConfigError(f"--against {lists[0]}: an audit compares volumes; lists of ids are for `build --exclude`")
    taken = {*names, *(entry["name"] for entry in corpus.info.get("audit", []))}
    free = (name for number in count(1) if (name := f"dataset-{number}") not in taken)
    called = [*names, *(next(free) for _ in against[len(names) :])]
    check_distinct(called, "data sets", "give each its own --name")
    how: dict[str, Any] = {"patient_pattern": options.patient_pattern, "same_ids": options.same_ids}
    how["modality"] = common_modality(corpus.modalities)
    return [
        check_config(SourceConfig, {"name": name, "path": str(path), **how}, where="--against, --name, --patient-pattern")
        for name, path in zip(called, against, strict=True)
    ]


def _record(root: Path, info: dict[str, Any], results: Sequence[AuditResult]) -> None:
    """Write the results into report.html and, last, into corpus.json."""
    known = {entry["name"]: entry for entry in info.get("audit", [])}
    for result in results:
        before = known.get(result.name, result.entry)
        if before["content_hash"] != result.entry["content_hash"]:
            _logger.warning("the record '%s' was of other data (%s); it is replaced", result.name, audit_text(before))
    # What a build left out for a set stays true, whatever an audit finds later.
    for result in results:
        left_out = {key: value for key, value in known.get(result.name, {}).items() if key == "left_out"}
        known[result.name] = {**result.entry, **left_out}
    _write_audits(root, info, [known[name] for name in sorted(known)])


def withdraw(root: Path, names: Sequence[str]) -> None:
    """Take audits out of a corpus's record and report.

    Args:
        root: The corpus.
        names: Of the audits.

    Raises:
        ConfigError: There is no audit of a name, or it is what a build held out.
        ShardError: It is no corpus.
    """
    info = Corpus(root).info
    known = {entry["name"]: entry for entry in info.get("audit", [])}
    for name in names:
        if name not in known:
            raise ConfigError(f"--withdraw {name}: {root} has no such audit; its audits: {', '.join(sorted(known)) or 'none'}")
        if "left_out" in known[name]:
            raise ConfigError(f"--withdraw {name}: volumes were left out for it, which stays true; only audits are withdrawn")
    _write_audits(root, info, [known[name] for name in sorted(known) if name not in names])


def _write_audits(root: Path, info: dict[str, Any], audits: list[dict[str, Any]]) -> None:
    manifests = dict(info["manifests"])
    path = root / REPORT
    report = with_audits(path.read_text(encoding="utf-8"), audits, info.get("exclusion_lists", [])) if path.is_file() else None
    if report is None:
        _logger.warning("%s has no place for audits; they stand in corpus.json only", path)
    else:
        write_text(path, report)
        manifests[REPORT] = sha256_file(path)
    write_json(root / "corpus.json", {**info, "audit": audits, "manifests": manifests})


def _lines(overlaps: Sequence[Overlap], held_out: HeldOutScan) -> tuple[str, ...]:
    lines = []
    for overlap in overlaps:
        place = held_out.places[held_out.rows[overlap.other]["volume_id"]]
        similarity = f" ({overlap.similarity:.3f})" if overlap.kind == "near" else ""
        lines.append(f"{overlap.volume_id} is by {overlap.kind}{similarity}: {place}")
    return tuple(lines)


def _salt(corpus: Corpus, salt_file: Path | None) -> tuple[Salt, dict[str, str]]:
    """Return the corpus's salt, or another one, and why which keys cannot be compared, by kind."""
    default = private_folder(corpus.root) / "salt"
    path = salt_file or (default if default.exists() else None)
    if path is None:  # content is compared all the same
        why = "the corpus's salt is not at hand (<corpus>.private/salt, or --salt-file)"
        return Salt(hashlib.sha256(str(corpus.content_hash).encode()).digest()), dict.fromkeys(SALTED, why)
    salt = load_salt(path, corpus.root)
    if salt.fingerprint != corpus.info.get("salt_fingerprint"):
        raise ConfigError(f"the salt in {path} is not the one {corpus.root} was made with; patients cannot be compared")
    is_current = corpus.info.get("patient_ids") == RULES_VERSION
    return salt, {} if is_current else {"patient": "the corpus is of an earlier version; build it again"}
