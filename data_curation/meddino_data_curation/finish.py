"""From finished volumes to a finished corpus: duplicates, held-out data, shards, manifests, report."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino_data_curation.audit import audit_entry
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.duplicates import exclude_overlaps, find_overlaps, mark_exact, mark_near
from meddino_data_curation.fingerprint import Fingerprint
from meddino_data_curation.manifests import write_corpus_json, write_fingerprints, write_slices, write_volumes
from meddino_data_curation.privacy import Salt
from meddino_data_curation.report import report_page
from meddino_data_curation.shards import drop_stale_shards, plan_shards, write_shards
from meddino_data_curation.survey import survey
from meddino_data_curation.volume_job import VolumeJob
from meddino_data_curation.work_folder import VolumeRecord, WorkFolder
from meddino_data_curation.worker_pool import cores

_logger = get_logger(__name__)


def finish(
    jobs: Sequence[VolumeJob],
    config: CurationConfig,
    held_out: Sequence[SourceConfig],
    corpus: Path,
    work: WorkFolder,
    salt: Salt,
    run_again: Callable[[Sequence[VolumeJob]], None],
) -> dict[str, Any]:
    """Put the finished volumes together to a corpus; corpus.json comes last.

    Args:
        jobs: All volumes, each with a record in the work folder.
        config: The curation.
        held_out: Volumes whose scans and patients must stay out.
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
    audits = [_exclude(source, rows, prints, config, salt) for source in held_out]
    kept = [record for record in records if record.row["status"] == "accepted"]
    if not kept:
        raise VolumeError(f"none of {len(rows)} volumes could be used: {_reasons(rows)}")
    plan = plan_shards(kept, int(config.shards.size_mib * 2**20))
    placed = drop_stale_shards(corpus, work, plan)
    lost = {record.row["volume_id"] for record in kept if record.row["volume_id"] not in placed and not work.has_piece(record)}
    if lost:
        run_again([job for job in jobs if job.candidate.volume_id in lost])
    shards = write_shards(corpus, work, plan, config.workers or cores())
    num_slices = write_slices(corpus / "slices.parquet", work, plan, config.shards.codec)
    write_volumes(corpus / "volumes.parquet", rows)
    if config.duplicates.near:
        write_fingerprints(corpus / "fingerprints.parquet", {name: prints[name] for name in _ids(kept) if name in prints})
    write_text(corpus / "report.html", report_page(config, rows, work, audits))
    return write_corpus_json(corpus, config, rows, shards, num_slices, salt.fingerprint, audits)


def _exclude(
    source: SourceConfig, rows: list[dict[str, Any]], prints: dict[str, Fingerprint], config: CurationConfig, salt: Salt
) -> dict[str, Any]:
    held_out = survey([source], config, salt)
    overlaps = find_overlaps(rows, prints, held_out.rows, held_out.prints)
    exclude_overlaps(rows, overlaps)
    left_out = len({overlap.volume_id for overlap in overlaps})
    _logger.info("%s: %d held-out volumes, %d volumes left out for them", source.name, len(held_out.rows), left_out)
    return {**audit_entry(source.name, held_out, []), "left_out": left_out}


def _ids(records: Sequence[VolumeRecord]) -> list[str]:
    return [record.row["volume_id"] for record in records]


def _records(jobs: Sequence[VolumeJob], work: WorkFolder) -> tuple[list[VolumeRecord], dict[str, Fingerprint]]:
    """Read what stays in memory of every record: not its slices, thumbnail and histogram."""
    records, prints = [], {}
    for job in jobs:
        record = work.read_record(job.candidate.volume_id)
        if record is None:
            raise ConfigError(f"the work folder {work.root} was changed while it was in use; run the same command again")
        if record.fingerprint:
            prints[record.row["volume_id"]] = Fingerprint.from_json(record.fingerprint)
        record.slices, record.thumbnail, record.histogram, record.fingerprint, record.refused = {}, "", [], None, {}
        records.append(record)
    return records, prints


def _reasons(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(str(row["reason"]) for row in rows if row["status"] == "rejected")
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(4))
