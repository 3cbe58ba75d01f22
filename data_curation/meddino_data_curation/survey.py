"""Looking at data without taking it in: what the volumes of a held-out set are, so that overlaps can be found."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from meddino.core.errors import ConfigError
from meddino.data.corpus import Corpus
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.discovery import discover
from meddino_data_curation.fingerprint import Fingerprint
from meddino_data_curation.manifests import read_fingerprints
from meddino_data_curation.privacy import Salt
from meddino_data_curation.progress import progress
from meddino_data_curation.volume_job import VolumeJob
from meddino_data_curation.work_folder import WorkFolder
from meddino_data_curation.worker_pool import cores, run_volumes


@dataclass
class Survey:
    """What a set of volumes holds.

    Attributes:
        rows: Like rows of volumes.parquet; only readable CT volumes.
        prints: By volume_id.
        places: By volume_id: the path inside the set, for the owner's eyes.
        unread: How many candidates could not be read.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    prints: dict[str, Fingerprint] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unread: int = 0


def survey(sources: Sequence[SourceConfig], config: CurationConfig, salt: Salt) -> Survey:
    """Read volumes for their content, look and identity only; nothing is kept on disk.

    Args:
        sources: Folders of volumes; a folder with a corpus in it is read from its manifests.
        config: How volumes are recognised and turned.
        salt: Makes the keys comparable with a corpus's.

    Raises:
        ConfigError: A source does not exist or holds no volume.
    """
    result = Survey()
    folders = [source for source in sources if not (source.path / "corpus.json").is_file()]
    for source in sources:
        if source not in folders:
            _read_corpus(source.path, salt, result)
    found = discover(folders, salt, config.workers or cores())
    if folders and not found.candidates:
        raise ConfigError(f"no CT volume under {', '.join(str(source.path) for source in folders)}")
    jobs = [VolumeJob(item, "survey", folders[item.source].name, "", is_survey=True) for item in found.candidates]
    if jobs:
        with (
            tempfile.TemporaryDirectory(prefix="meddino-survey-") as name,
            progress("reading held-out data", len(jobs)) as advance,
        ):
            run_volumes(jobs, config, Path(name), min(config.workers or cores(), len(jobs)), lambda _: advance())
            _collect(jobs, WorkFolder(Path(name)), result)
    return result


def _collect(jobs: Sequence[VolumeJob], work: WorkFolder, result: Survey) -> None:
    for job in jobs:
        record = work.read_record(job.candidate.volume_id)
        if record is None or record.row["status"] != "accepted":
            result.unread += 1
            continue
        volume_id = record.row["volume_id"]
        result.rows.append(record.row)
        result.places[volume_id] = job.candidate.place
        if record.fingerprint:
            result.prints[volume_id] = Fingerprint.from_json(record.fingerprint)


def _read_corpus(root: Path, salt: Salt, result: Survey) -> None:
    corpus = Corpus(root)
    comparable = corpus.info.get("salt_fingerprint") == salt.fingerprint
    hidden = {} if comparable else {"patient_key": None, "study_key": None, "series_key": None}
    rows = [{**row, **hidden} for row in pq.read_table(root / "volumes.parquet").to_pylist() if row["status"] == "accepted"]
    result.rows += rows
    result.places.update({row["volume_id"]: f"volume {row['volume_id']}" for row in rows})
    result.prints.update(read_fingerprints(root / "fingerprints.parquet"))
