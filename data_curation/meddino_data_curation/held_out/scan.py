"""Looking at data without taking it in: what the volumes of a held-out set are, so that overlaps can be found."""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json
from meddino.data.corpus import Corpus
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.corpus.manifests import read_fingerprints
from meddino_data_curation.corpus.work_folder import WorkFolder, job_hash
from meddino_data_curation.privacy import Salt
from meddino_data_curation.progress import progress
from meddino_data_curation.selection.fingerprint import Fingerprint
from meddino_data_curation.selection.volume_job import VolumeJob
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.discovery import Discovery, discover, nothing_found
from meddino_data_curation.sources.patient_ids import RULES_VERSION, key_inside, without_common_names
from meddino_data_curation.worker_pool import run_volumes, worker_count

# Refusals of what cannot be a CT volume of a corpus. Everything else that is refused may be CT which was not looked at.
_NO_CT = re.compile(
    r"looks like a (label map|binary mask)|"
    r"DICOM: (secondary capture|not a CT image|modality is|localiser|derived|text is burned|colour)"
)
SALTED = ("series", "study", "patient")  # kinds that are compared by salted hashes


@dataclass
class HeldOutScan:
    """What a set of volumes holds.

    Attributes:
        rows: Like rows of volumes.parquet. What could not be read or is no CT has no content, but its ids count.
            `patient_keys` has the patient's keys inside the sources it is compared with, where ids are the same there.
        prints: By volume_id.
        places: By volume_id: the path inside the set, for the owner's eyes.
        volumes: How many were read.
        no_ct: Reasons, with counts, of what was looked at and is no CT.
        unread: Reasons, with counts, of what could not be read.
        hidden: Why keys of it cannot be compared, by kind.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    prints: dict[str, Fingerprint] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    volumes: int = 0
    no_ct: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    hidden: dict[str, str] = field(default_factory=dict)


def scan(
    sources: Sequence[SourceConfig],
    config: CurationConfig,
    salt: Salt,
    compared_with: Sequence[str] = (),
    work: Path | None = None,
) -> HeldOutScan:
    """Read volumes for their content, look and identity only.

    Args:
        sources: Folders of volumes; a folder with a corpus in it is read from its manifests.
        config: How volumes are recognised and turned.
        salt: Makes the keys comparable with a corpus's.
        compared_with: Names of the corpus's sources, for ids that mean the same there.
        work: Keeps what was read, so that it is not read again; None keeps nothing.

    Raises:
        ConfigError: A source does not exist or holds no volume.
    """
    result = HeldOutScan()
    for source in sources:
        if _is_corpus(source):
            _read_corpus(source.path, salt, result)
    folders = [source for source in sources if not _is_corpus(source)]
    candidates, result.unread = volumes_of(folders, salt, worker_count(config))
    text = canonical_json({name: getattr(config, name).model_dump(mode="json") for name in ("hounsfield", "orientation")})
    jobs = []
    for item in candidates:
        digest = job_hash("scan", salt.fingerprint, text, item.volume_id, item.modified, item.problem)
        jobs.append(VolumeJob(item, digest, folders[item.source].name, "", folders[item.source].modality, True))
    if jobs:
        with _kept(work) as place:
            _read(jobs, config, place)
            for job in jobs:
                _collect(job, WorkFolder(place), result)
                _add_keys(result.rows[-1], job.candidate, folders[job.candidate.source], compared_with, salt)
    return result


def volumes_of(sources: Sequence[SourceConfig], salt: Salt, workers: int) -> tuple[list[Candidate], Counter[str]]:
    """Return what may be a volume in held-out data, corpora left aside, and which files hold volumes that are not read.

    Raises:
        ConfigError: A source does not exist or holds no volume.
    """
    folders = [source for source in sources if not _is_corpus(source)]
    found = discover(folders, salt, workers)
    if folders and not found.candidates:
        raise ConfigError(
            f"{nothing_found(folders, found)}; held-out data is a folder of volumes or pictures, a corpus, or a list (.txt, "
            ".csv) with an id or path a line"
        )
    return without_common_names(found.candidates, folders, salt), _hidden_in_files(found)


def _hidden_in_files(found: Discovery) -> Counter[str]:
    """Return the files in which scans may hide: archives, other formats, no permission. An empty one hides nothing."""
    rows = Counter(f"unreadable: {item.problem}" for item in found.candidates if item.problem)
    return Counter({reason: count for reason, count in (found.unused - rows).items() if "file is empty" not in reason})


def _is_corpus(source: SourceConfig) -> bool:
    return (source.path / "corpus.json").is_file()


@contextmanager
def _kept(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="meddino-scan-") as name:
        yield Path(name)


def _read(jobs: Sequence[VolumeJob], config: CurationConfig, place: Path) -> None:
    """Read the volumes that have no record of this very job yet."""
    work = WorkFolder(place)
    missing = [job for job in jobs if work.record_of(job.candidate.volume_id, job.job) is None]
    if missing:
        with progress("reading held-out data", len(missing)) as advance:
            run_volumes(missing, config, place, min(worker_count(config), len(missing)), lambda _: advance())


def _collect(job: VolumeJob, work: WorkFolder, result: HeldOutScan) -> None:
    candidate = job.candidate
    record = work.finished_record(candidate.volume_id)
    ids = {"patient_key": candidate.patient_key, "patient_is_known": candidate.patient_is_known}
    result.rows.append({**record.row, **ids})
    result.places[candidate.volume_id] = candidate.source_path
    if record.row["status"] == "accepted":
        result.volumes += 1
        if record.fingerprint:
            result.prints[candidate.volume_id] = Fingerprint.from_json(record.fingerprint)
        return
    reason = str(record.row["reason"])
    (result.no_ct if is_no_ct(reason) else result.unread)[reason] += 1


def is_no_ct(reason: str) -> bool:
    """Tell whether a volume was refused as something that cannot be CT, not because it could not be read."""
    return _NO_CT.match(reason) is not None


def _add_keys(row: dict[str, Any], candidate: Candidate, source: SourceConfig, names: Sequence[str], salt: Salt) -> None:
    """Give a row the patient's keys inside the corpus's sources, where its ids are the same there."""
    if source.same_ids and candidate.patient:
        row["patient_keys"] = [key_inside(salt, name, candidate.patient) for name in names]
        row["patient_is_known"] = True


def _read_corpus(root: Path, salt: Salt, result: HeldOutScan) -> None:
    corpus = Corpus(root)
    if corpus.info.get("salt_fingerprint") != salt.fingerprint:
        result.hidden.update(dict.fromkeys(SALTED, "it is a corpus with another salt"))
    elif corpus.info.get("patient_ids") != RULES_VERSION:
        result.hidden["patient"] = "it is a corpus of an earlier version"
    columns = {f"{kind}_key": None for kind in result.hidden}
    rows = [{**row, **columns} for row in corpus.volumes.to_pylist() if row["status"] in ("accepted", "duplicate")]
    result.rows += rows
    result.volumes += len(rows)
    result.places.update({row["volume_id"]: f"volume {row['volume_id']}" for row in rows})
    result.prints.update(read_fingerprints(root / "fingerprints.parquet"))
