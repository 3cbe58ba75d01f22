"""`meddino-curate build`: sources in, corpus out. Killed anywhere, the same command goes on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meddino
from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import canonical_json, write_json
from meddino.core.logging import get_logger
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.discovery import Discovery, discover
from meddino_data_curation.duplicates import exact_duplicates
from meddino_data_curation.manifests import write_corpus_json, write_slices, write_volumes
from meddino_data_curation.privacy import Salt, load_salt, private_folder, write_source_map
from meddino_data_curation.progress import progress
from meddino_data_curation.shards import drop_stale_shards, plan_shards, write_shards
from meddino_data_curation.volume_job import VolumeJob
from meddino_data_curation.work_folder import VolumeRecord, WorkFolder, job_hash
from meddino_data_curation.worker_pool import cores, run_volumes

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """Which share of the volumes a job does.

    Attributes:
        index: From 1.
        count: Number of parts.
    """

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "i/n".

        Raises:
            ConfigError: It is not that, or i is not in 1..n.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
            raise ConfigError(f"--part {text}: write i/n with 1 <= i <= n, for example 1/8")
        return cls(int(index), int(count))

    def holds(self, volume_id: str) -> bool:
        """Tell whether a volume belongs to this part: by its id, so that parts need not know of each other."""
        return int(volume_id[:8], 16) % self.count == self.index - 1


def build(config: CurationConfig, corpus: Path, part: Part | None = None) -> None:
    """Build a corpus, or one part of it.

    Args:
        config: With at least one source.
        corpus: Folder to write.
        part: None does everything; a part leaves its volumes to `merge`.

    Raises:
        ConfigError: Sources, salt or output folder are wrong.
        VolumeError: No volume could be used, or too many were refused.
    """
    _check_out(corpus)
    salt = load_salt(config.privacy.salt_file, corpus)
    found = discover(config.sources, salt)
    _check_found(found, config)
    inputs = _inputs_hash(found, config)
    if _is_finished(corpus, inputs):
        return
    work = WorkFolder(corpus)
    with work.locked(shared=part is not None):
        if part is None:
            work.sweep()
        jobs = _jobs(found, config, salt, part or Part())
        _write_source_map(found, config, corpus, part)
        _run(jobs, config, corpus, work)
        if part is not None:
            name = f"{part.index}-of-{part.count}"
            write_json(work.root / "parts" / f"{name}.json", {"index": part.index, "count": part.count, "inputs": inputs})
            _logger.info("part %d of %d is done; when all are: meddino-curate merge %s", part.index, part.count, corpus)
            return
        finish(jobs, config, corpus, work, salt, inputs)


def finish(jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, work: WorkFolder, salt: Salt, inputs: str) -> None:
    """Put the finished volumes together to a corpus."""
    records = _records(jobs, work)
    rows = [record.row for record in records]
    _mark_duplicates(rows, config)
    kept = [record for record in records if record.row["status"] == "accepted"]
    if not kept:
        raise VolumeError(f"none of {len(rows)} volumes could be used: {_reasons(rows)}")
    plan = plan_shards(kept, int(config.shards.size_mib * 2**20))
    placed = drop_stale_shards(corpus, work, plan)
    lost = {record.row["volume_id"] for record in kept if record.row["volume_id"] not in placed and not work.has_piece(record)}
    _run_all([job for job in jobs if job.candidate.volume_id in lost], config, corpus, work)
    shards = write_shards(corpus, work, plan)
    num_slices = write_slices(corpus / "slices.parquet", work, plan, config.shards.codec)
    write_volumes(corpus / "volumes.parquet", rows)
    info = write_corpus_json(corpus, config, rows, shards, num_slices, salt.fingerprint)
    write_json(private_folder(corpus) / "inputs.json", {"inputs": inputs, "content_hash": info["content_hash"]})
    work.remove()
    totals = info["totals"]
    _logger.info(
        "%s: %d slices of %d volumes kept, %d refused, %d duplicates",
        corpus, num_slices, totals["accepted"], totals["rejected"], totals["duplicate"],
    )  # fmt: skip


def _check_out(corpus: Path) -> None:
    if corpus.exists() and not corpus.is_dir():
        raise ConfigError(f"--out {corpus} is a file; name a new or empty folder")
    own = {"shards", "slices.parquet", "volumes.parquet", "corpus.json", "report.html", ".work"}
    strange = sorted(entry.name for entry in corpus.iterdir() if entry.name not in own) if corpus.is_dir() else []
    if [name for name in strange if not name.endswith(".partial")]:
        raise ConfigError(f"--out {corpus} holds other things ('{strange[0]}'); name a new or empty folder")


def _check_found(found: Discovery, config: CurationConfig) -> None:
    if not config.sources:
        raise ConfigError("no source; name a folder of CT volumes, or `sources` in a config")
    if not found.candidates:
        where = ", ".join(str(source.path) for source in config.sources)
        seen = sum(found.files.values())
        raise ConfigError(f"no CT volume under {where}: {seen} files, none of them DICOM, NIfTI, NRRD, MHA or MHD")


def _inputs_hash(found: Discovery, config: CurationConfig) -> str:
    text = canonical_json([[candidate.volume_id, candidate.stamp] for candidate in found.candidates])
    return hashlib.sha256((_config_text(config) + text).encode("utf-8", "surrogateescape")).hexdigest()


def _config_text(config: CurationConfig) -> str:
    return canonical_json(config.public()) + meddino.__version__


def _is_finished(corpus: Path, inputs: str) -> bool:
    if not (corpus / "corpus.json").is_file():
        return False
    path = private_folder(corpus) / "inputs.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("inputs") != inputs:
        raise ConfigError(
            f"{corpus} is a finished corpus of other files or another config; choose another --out, or remove it first"
        )
    _logger.info("%s is finished already; nothing to do", corpus)
    return True


def _jobs(found: Discovery, config: CurationConfig, salt: Salt, part: Part) -> list[VolumeJob]:
    text = _config_text(config)
    jobs = []
    for candidate in found.candidates:
        if part.holds(candidate.volume_id):
            source = config.sources[candidate.source]
            job = job_hash(salt.fingerprint, text, candidate.volume_id, candidate.stamp)
            jobs.append(VolumeJob(candidate, job, source.name, source.licence))
    return jobs


def _run(jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, work: WorkFolder) -> None:
    """Do the volumes that have no record of this very job yet."""
    in_shards = {volume_id for note in work.shard_notes().values() for volume_id, _, _ in note["volumes"]}
    unfinished, finished = [], []
    for job in jobs:
        record = work.read_record(job.candidate.volume_id)
        if record is None or record.job != job.job or not (work.has_piece(record) or job.candidate.volume_id in in_shards):
            unfinished.append(job)
        else:
            finished.append(str(record.row["status"]))
    if finished:
        _logger.info("%d of %d volumes are done already", len(finished), len(jobs))
    _run_all(unfinished, config, corpus, work, finished)


def _run_all(
    jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, work: WorkFolder, finished: Sequence[str] = ()
) -> None:
    if not jobs:
        return
    # Large ones first: the last worker then never sits alone over one.
    largest_first = sorted(jobs, key=lambda job: (-_size(job), job.candidate.volume_id))
    workers = min(config.workers or cores(), len(jobs))
    with progress("curating volumes", len(jobs)) as advance:
        run_volumes(largest_first, config, corpus, workers, _watch(config, Counter(finished), advance))


def _watch(config: CurationConfig, status: Counter[str], advance: Callable[[], None]) -> Callable[[str], None]:
    def on_done(outcome: str) -> None:
        status[outcome] += 1
        advance()
        done, limit = sum(status.values()), config.limits.max_rejected_fraction
        if limit < 1 and done >= config.limits.rejected_fraction_after and status["rejected"] > limit * done:
            raise VolumeError(
                f"{status['rejected']} of the first {done} volumes were refused, limits.max_rejected_fraction is {limit:g}; "
                "what was done is kept; mend the sources or raise the limit, then run the same command again"
            )

    return on_done


def _size(job: VolumeJob) -> int:
    return sum(path.stat().st_size for path in job.candidate.files if path.exists())


def _records(jobs: Sequence[VolumeJob], work: WorkFolder) -> list[VolumeRecord]:
    """Read what stays in memory of every record: not its slices, thumbnail and histogram."""
    records = []
    for job in jobs:
        record = work.read_record(job.candidate.volume_id)
        if record is None:
            raise ConfigError(f"the work folder {work.root} was changed while it was in use; run the same command again")
        record.slices, record.thumbnail, record.histogram = {}, "", []
        records.append(record)
    return records


def _mark_duplicates(rows: Sequence[dict[str, Any]], config: CurationConfig) -> None:
    preference = {source.name: source.preference for source in config.sources}
    found = exact_duplicates(rows, preference) if config.duplicates.exact else {}
    for row in rows:
        if duplicate := found.get(row["volume_id"]):
            row.update(status="duplicate", duplicate_of=duplicate.of, duplicate_kind=duplicate.kind, num_slices_kept=0)


def _reasons(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(str(row["reason"]) for row in rows if row["status"] == "rejected")
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(4))


def _write_source_map(found: Discovery, config: CurationConfig, corpus: Path, part: Part | None) -> None:
    name = "sources" if part is None else f"sources-{part.index}-of-{part.count}"
    entries = ((item.volume_id, config.sources[item.source].name, item.place) for item in found.candidates)
    write_source_map(private_folder(corpus), name, entries)
