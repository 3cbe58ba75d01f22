"""From finished volumes to a finished corpus: duplicates, held-out data, shards, manifests, report."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino.data.audits import extent_clauses, lists_text
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.corpus.manifests import write_corpus_json, write_fingerprints, write_slices, write_volumes
from meddino_data_curation.corpus.report import report_page
from meddino_data_curation.corpus.shards import drop_stale_shards, plan_shards, write_shards
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder
from meddino_data_curation.held_out.comparison import audit_entry, unread_problem
from meddino_data_curation.held_out.exclusions import ExclusionMatch
from meddino_data_curation.held_out.scan import HeldOutScan, is_no_ct, scan, volumes_of
from meddino_data_curation.privacy import Salt, private_folder, write_refusals
from meddino_data_curation.selection.duplicates import (
    Overlap,
    exclude_overlaps,
    find_overlaps,
    mark_exact,
    mark_near,
    with_relatives,
)
from meddino_data_curation.selection.fingerprint import Fingerprint
from meddino_data_curation.selection.volume_job import VolumeJob
from meddino_data_curation.worker_pool import worker_count

_logger = get_logger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """A held-out set.

    Attributes:
        name: In the record.
        found: What is in it.
    """

    name: str
    found: HeldOutScan


def finish(
    jobs: Sequence[VolumeJob],
    config: CurationConfig,
    held_out: Sequence[HeldOut],
    listed: ExclusionMatch,
    corpus: Path,
    work: WorkFolder,
    salt: Salt,
    run_again: Callable[[Sequence[VolumeJob]], None],
) -> dict[str, Any]:
    """Put the finished volumes together to a corpus; corpus.json comes last.

    Args:
        jobs: All volumes, each with a record in the work folder.
        config: The curation.
        held_out: Volumes whose scans and patients must stay out, and what they are.
        listed: Volumes that lists name.
        corpus: Folder to write.
        work: Its work folder.
        salt: For the keys of held-out volumes.
        run_again: Does volumes whose pieces were lost.

    Returns:
        The content of corpus.json.

    Raises:
        VolumeError: No volume is left.
    """
    records, prints = _records(jobs, work)
    rows = [record.row for record in records]
    preference = {source.name: source.preference for source in config.sources}
    if config.duplicates.exact:
        mark_exact(rows, preference)
    if config.duplicates.near:
        mark_near(rows, prints, preference)
    lists = _exclude_listed(listed, rows)
    audits = [_exclude(held, rows, prints) for held in held_out]
    kept = sorted((record for record in records if record.row["status"] == "accepted"), key=_by_content)
    if not kept:
        raise VolumeError(f"none of {len(rows)} volumes could be used: {_reasons(rows)}")
    plan = plan_shards(kept, int(config.shards.size_mib * 2**20))
    placed = drop_stale_shards(corpus, work, plan)
    lost = {record.row["volume_id"] for record in kept if record.row["volume_id"] not in placed and not work.has_piece(record)}
    if lost:
        run_again([job for job in jobs if job.candidate.volume_id in lost])
    shards = write_shards(corpus, work, plan, config.shards.codec, worker_count(config))
    num_slices = write_slices(corpus / "slices.parquet", work, plan, shards, config.shards.codec)
    write_volumes(corpus / "volumes.parquet", rows)
    if config.duplicates.near:
        write_fingerprints(corpus / "fingerprints.parquet", {name: prints[name] for name in _ids(kept) if name in prints})
    write_text(corpus / "report.html", report_page(config, rows, work, audits, lists))
    write_refusals(
        private_folder(corpus), rows, [(job.candidate.volume_id, job.dataset, job.candidate.source_path) for job in jobs]
    )
    files = work.read_found()
    return write_corpus_json(corpus, config, rows, shards, num_slices, salt.fingerprint, audits, lists, files)


def scan_held_out(
    sources: Sequence[SourceConfig], config: CurationConfig, salt: Salt, work: WorkFolder, reads: bool
) -> list[HeldOut]:
    """Read the held-out data, before anything is curated: what is wrong with it should not be told days later.

    Args:
        sources: Folders, files or corpora.
        config: The curation.
        salt: Of the corpus.
        work: Keeps what was read, so that a killed build need not read it again.
        reads: False only looks whether volumes are there: parts leave the reading to `merge`.

    Raises:
        ConfigError: A set holds no volume, or some of it cannot be read.
    """
    names = [source.name for source in config.sources]
    held_out = []
    for source in sources:
        if not reads:
            volumes_of([source], salt, worker_count(config))
            continue
        found = scan([source], config, salt, names, work.root / "held-out" / source.name)
        allowed = config.exclusion.allow_unread
        if problem := unread_problem(f"held-out data '{source.name}'", found, allowed, "exclusion.allow_unread=true"):
            raise ConfigError(problem)
        held_out.append(HeldOut(source.name, found))
    return held_out


def _exclude(held: HeldOut, rows: list[dict[str, Any]], prints: dict[str, Fingerprint]) -> dict[str, Any]:
    overlaps = find_overlaps(rows, prints, held.found.rows, held.found.prints)
    entry = audit_entry(held.name, rows, prints, held.found, [])
    left_out = exclude_overlaps(rows, overlaps)
    _logger.info("%s: %s; %d volumes left out", held.name, "; ".join(extent_clauses(entry)), left_out)
    return {**entry, "left_out": left_out}


def _exclude_listed(listed: ExclusionMatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Refuse what lists name, its copies, and what else is of its patient."""
    named = [Overlap(row["volume_id"], -1, "exact") for row in rows if row["volume_id"] in listed.volumes]
    related = with_relatives(rows, named)
    unread = {row["volume_id"] for row in rows if row["status"] == "rejected" and not is_no_ct(str(row["reason"]))}
    for row in rows:
        if row["volume_id"] in listed.volumes:
            row.update(status="rejected", reason="held out: named by an exclusion list", num_slices_kept=0)
            row.update(duplicate_of=None, duplicate_kind=None)
    others = exclude_overlaps(rows, related, "is named by an exclusion list")
    if others:
        _logger.info("%d more volumes left out: copies of listed ones, or of the same patient", others)
    entries = [{**outcome.entry, "unread": len(outcome.volumes & unread)} for outcome in listed.outcomes]
    if any(entry["unread"] for entry in entries):
        _logger.warning("listed volumes could not be read, so that copies of them are not found: %s", lists_text(entries))
    return entries


def _by_content(record: VolumeRecord) -> str:
    """Return what orders volumes: not their ids, so that another salt gives the same order and the same training."""
    return str(record.row["content_hash"])


def _ids(records: Sequence[VolumeRecord]) -> list[str]:
    return [record.row["volume_id"] for record in records]


def _records(jobs: Sequence[VolumeJob], work: WorkFolder) -> tuple[list[VolumeRecord], dict[str, Fingerprint]]:
    """Read what stays in memory of every record: not its slices, thumbnail and histogram."""
    records, prints = [], {}
    for job in jobs:
        record = work.finished_record(job.candidate.volume_id)
        ids = job.candidate
        record.row.update(patient_key=ids.patient_key, patient_is_known=ids.patient_is_known)
        record.row.update(patient_is_named=ids.patient_is_named)
        if record.fingerprint:
            prints[record.row["volume_id"]] = Fingerprint.from_json(record.fingerprint)
        record.slices, record.thumbnail, record.histogram, record.fingerprint, record.refused = {}, "", [], None, {}
        records.append(record)
    return records, prints


def _reasons(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(str(row["reason"]) for row in rows if row["status"] == "rejected")
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(4))
