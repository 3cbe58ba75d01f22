"""`meddino-curate build`: sources in, corpus out. Killed anywhere, the same command goes on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meddino
from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import canonical_json, write_json
from meddino.core.logging import get_logger
from meddino.volumes.archives import file_size
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.finish import finish, scan_held_out
from meddino_data_curation.corpus.work_folder import WorkFolder, job_hash
from meddino_data_curation.held_out.exclusions import ExclusionMatch, apply_lists, read_exclusions
from meddino_data_curation.privacy import Salt, load_salt, private_folder, write_source_map
from meddino_data_curation.progress import progress
from meddino_data_curation.selection.volume_job import VolumeJob
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.discovery import Discovery, discover, nothing_found
from meddino_data_curation.sources.licences import NOT_STATED, needs_decision
from meddino_data_curation.sources.patient_ids import told_by_name, without_common_names
from meddino_data_curation.worker_pool import run_volumes, worker_count

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


def build(
    config: CurationConfig,
    corpus: Path,
    part: Part | None = None,
    listed_before: str | None = None,
    known: frozenset[str] = frozenset(),
) -> bool:
    """Build a corpus, or one part of it.

    Args:
        config: With at least one source.
        corpus: Folder to write.
        part: None does everything; a part leaves its volumes to `merge`.
        listed_before: Digest of what lists named when the parts were built; None where nothing was built before.
        known: Volumes that are not wanted again.

    Returns:
        False if all volumes are known, so that there is nothing to build.

    Raises:
        ConfigError: Sources, salt or output folder are wrong.
        VolumeError: No volume could be used, or too many were refused.
    """
    check_out(corpus)
    salt = load_salt(config.privacy.salt_file, corpus)
    exclusions = read_exclusions(config)
    _check_licences(config)
    found = discover(config.sources, salt, worker_count(config))
    _check_found(found, config)
    named = without_common_names(found.candidates, config.sources, salt)
    fresh = [item for item in named if item.volume_id not in known]
    if known:
        _logger.info("%d of %d volumes are known already", len(named) - len(fresh), len(named))
        if not fresh:
            return False
    _tell_of_patients(fresh, config)
    found.candidates = sorted(fresh, key=lambda item: (item.source, item.source_path))  # the same with any salt
    listed = apply_lists(found.candidates, exclusions, config, salt, corpus)
    _check_same_lists(listed, listed_before)
    inputs = _inputs_hash(found, config, exclusions.digest + listed.digest + salt.fingerprint)
    if _is_finished(corpus, inputs):
        return True
    work = WorkFolder(corpus)
    with work.locked(shared=part is not None):
        if part is None:
            work.sweep()
        held_out = scan_held_out(exclusions.data, config, salt, work, reads=part is None)
        jobs = _jobs(found, config, salt, part or Part(), listed)
        _write_source_map(found, config, corpus, part)
        work.write_found(found.files)
        write_json(private_folder(corpus) / "build.json", config.model_dump(mode="json"))
        _run(jobs, config, corpus, work)
        if part is not None:
            _note_part(part, inputs, listed, corpus, work)
            return True
        # Before the corpus: killed between the two, the same command still knows it as its own.
        write_json(private_folder(corpus) / "inputs.json", {"inputs": inputs})
        info = finish(jobs, config, held_out, listed, corpus, work, salt, lambda again: _run_all(again, config, corpus))
        work.remove()
    _tell("new volumes" if known else str(corpus), info["totals"], found)
    return True


def _check_same_lists(listed: ExclusionMatch, listed_before: str | None) -> None:
    if listed_before is not None and listed.digest != listed_before:
        raise ConfigError(
            "exclusion lists name other volumes than when the parts were built; run this in the folder where the parts ran "
            "(paths in lists may count from there), or build the parts again"
        )


def _tell_of_patients(fresh: Sequence[Candidate], config: CurationConfig) -> None:
    if count := told_by_name(fresh, config.sources):
        _logger.info(
            "%d volumes: the file's name stands for the patient; if a folder or a part of the name does, say so with "
            "the source's patient_pattern (docs/curation.md, Sources)",
            count,
        )


def _note_part(part: Part, inputs: str, listed: ExclusionMatch, corpus: Path, work: WorkFolder) -> None:
    name = f"{part.index}-of-{part.count}"
    note = {"index": part.index, "count": part.count, "inputs": inputs, "listed": listed.digest}
    write_json(work.root / "parts" / f"{name}.json", note)
    _logger.info("part %d of %d is done; when all are: meddino-curate merge %s", part.index, part.count, corpus)


def _tell(corpus: str, totals: dict[str, int], found: Discovery) -> None:
    _logger.info(
        "%s: %d slices of %d volumes kept, %d refused, %d duplicates",
        corpus, totals["slices"], totals["accepted"], totals["rejected"], totals["duplicate"],
    )  # fmt: skip
    if found.unused:
        _logger.warning("%d files could not be used: %s", found.unused.total(), found.told())


def check_out(corpus: Path) -> None:
    """Refuse an output folder that holds other things than a corpus, finished or not.

    Raises:
        ConfigError: It does, or is a file.
    """
    if corpus.exists() and not corpus.is_dir():
        raise ConfigError(f"--out {corpus} is a file; name a new or empty folder")
    if WorkFolder(corpus).is_changing():
        raise ConfigError(f"--out {corpus} was being changed by erase, add or merge; run that command again first")
    own = {"shards", "slices.parquet", "volumes.parquet", "fingerprints.parquet", "corpus.json", "report.html", ".work"}
    strange = sorted(entry.name for entry in corpus.iterdir() if entry.name not in own) if corpus.is_dir() else []
    if [name for name in strange if not name.endswith(".partial")]:
        raise ConfigError(f"--out {corpus} holds other things ('{strange[0]}'); name a new or empty folder")


def _check_found(found: Discovery, config: CurationConfig) -> None:
    if not config.sources:
        raise ConfigError("no source; name a folder of CT volumes, or `sources` in a config")
    if not found.candidates:
        raise ConfigError(nothing_found(config.sources, found))
    with_volumes = {candidate.source for candidate in found.candidates}
    for number, source in enumerate(config.sources):
        if number not in with_volumes:
            _logger.warning("source '%s' holds no file that may be a volume; is its path right, and its include?", source.name)


def _check_licences(config: CurationConfig) -> None:
    undecided = {source.licence_text for source in config.sources if needs_decision(source.licence)} - set(
        config.licences.allow
    )
    if undecided:
        raise ConfigError(
            f"licences that forbid commercial use or are unclear: {'; '.join(sorted(undecided))}; "
            "name those you may use in licences.allow"
        )
    unnamed = [source.name for source in config.sources if source.licence is None]
    if unnamed:
        _logger.info("%s: no licence named, recorded as '%s'; right for your own scans only", ", ".join(unnamed), NOT_STATED)


def _inputs_hash(found: Discovery, config: CurationConfig, others: str) -> str:
    text = canonical_json([[item.volume_id, item.modified, item.problem] for item in found.candidates])
    return hashlib.sha256((_config_text(config) + others + text).encode("utf-8", "surrogateescape")).hexdigest()


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
    say_finished(corpus)
    return True


def say_finished(corpus: Path) -> None:
    """Say that there is nothing to do, and remove what a run left that was killed after its last file."""
    _logger.info("%s is finished already; nothing to do", corpus)
    work = WorkFolder(corpus)
    if work.exists():
        with suppress(ConfigError), work.locked(shared=False):
            work.remove()


def _jobs(found: Discovery, config: CurationConfig, salt: Salt, part: Part, listed: ExclusionMatch) -> list[VolumeJob]:
    text = _config_text(config)
    jobs = []
    for candidate in found.candidates:
        if part.holds(candidate.volume_id):
            source = config.sources[candidate.source]
            # What a list names is looked at as held-out data is: its copies have other names and must stay out too.
            is_listed = candidate.volume_id in listed.volumes
            parts = (candidate.volume_id, candidate.modified, candidate.problem, *(["listed"] if is_listed else []))
            job = job_hash(salt.fingerprint, text, *parts)
            jobs.append(VolumeJob(candidate, job, source.name, source.licence_text, source.modality, is_listed))
    return jobs


def _run(jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, work: WorkFolder) -> None:
    """Do the volumes that have no record of this very job yet."""
    in_shards = {volume_id for note in work.shard_notes().values() for volume_id, _, _ in note["volumes"]}
    unfinished, finished = [], []
    for job in jobs:
        record = work.record_of(job.candidate.volume_id, job.job)
        if record is None or not (work.has_piece(record) or job.candidate.volume_id in in_shards):
            unfinished.append(job)
        else:
            finished.append(str(record.row["status"]))
    if finished:
        _logger.info("%d of %d volumes are done already", len(finished), len(jobs))
    _run_all(unfinished, config, corpus, finished)


def _run_all(jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, finished: Sequence[str] = ()) -> None:
    if not jobs:
        return
    # Large ones first: the last worker then never sits alone over one. Pictures of one array together: it is unpacked once.
    largest_first = sorted(jobs, key=_work_order)
    workers = min(worker_count(config), len(jobs))
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


def _work_order(job: VolumeJob) -> tuple[int, str, str, str]:
    candidate = job.candidate
    return -_size(job), str(candidate.files[0]) if candidate.key else "", candidate.key, candidate.volume_id


def _size(job: VolumeJob) -> int:
    return sum(_bytes(path) for path in job.candidate.files)


def _bytes(path: Path) -> int:
    with suppress(OSError, VolumeError):
        return file_size(path)
    return 0


def _write_source_map(found: Discovery, config: CurationConfig, corpus: Path, part: Part | None) -> None:
    name = "sources" if part is None else f"sources-{part.index}-of-{part.count}"
    entries = ((item.volume_id, config.sources[item.source].name, item.source_path) for item in found.candidates)
    write_source_map(private_folder(corpus), name, entries)
