"""What the lineage of weights says of their corpus: its data sets, and which volumes they were trained on.

The volumes are a list of content hashes that travels with run and export. With it, a test set can be compared with what a
model has seen where the corpus itself is not at hand. The hashes are of voxels in Hounsfield units (whatever a file's format,
type and orientation): they name nobody, and only who has a scan can find it.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from meddino.checkpoints.export.model_folder import DataRecord, TrainingVolumesRecord, is_model_folder, read_config
from meddino.checkpoints.state.names import META_FILE
from meddino.checkpoints.state.verify import verify_checkpoint
from meddino.core.config import check_config
from meddino.core.errors import CheckpointError
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino.data.audits import says_something
from meddino.data.corpus import Corpus
from meddino.data.overlap import IN_TRAINING, VOLUMES_FILE, content_key

logger = get_logger(__name__)
_MAX_BYTES = 1 << 28
_LEVELS = 3  # from a checkpoint's folder up to its run's


def corpus_lineage(corpus: Corpus, volumes: pa.Table | None = None) -> dict[str, Any]:
    """Return `corpus_hash`, `data`, `training_volumes` and `audited_against`, as JSON.

    `data` are the data sets with their licences and accepted volumes.

    Args:
        corpus: The trainer puts this into its checkpoints' `lineage`.
        volumes: The rows of its volume manifest that are learnt from, where weights leave some out; None: all of them.
    """
    volumes = corpus.volumes if volumes is None else volumes
    columns = volumes.select(["dataset", "licence", "status"]).to_pylist()
    counts = Counter((row["dataset"], row["licence"]) for row in columns if row["status"] == "accepted")
    records = [DataRecord(dataset=name, licence=licence, volumes=count) for (name, licence), count in sorted(counts.items())]
    return {
        "corpus_hash": corpus.content_hash,
        "data": [record.model_dump(mode="json") for record in records],
        "training_volumes": list_record(volume_list(volumes)).model_dump(mode="json"),
        "audited_against": [_audit_text(entry) for entry in corpus.info.get("audit", []) if says_something(entry)],
    }


def _audit_text(entry: dict[str, Any]) -> str:
    """Return a test set's name; with what was found of it, and what of it could not be looked at."""
    counts = {"overlaps": int(entry.get("overlaps", 0)), "volumes unread": int(entry.get("unread", 0))}
    told = [f"{count} {what}" for what, count in counts.items() if count]
    if not entry.get("compared", {"patient": 1}).get("patient"):
        told.append("patients not compared")
    return f"{entry['name']} ({', '.join(told)})" if told else str(entry["name"])


def volume_list(volumes: pa.Table) -> str:
    """Return the list of rows of a volume manifest, one volume a line, sorted: equal corpora give equal bytes."""
    rows = volumes.select(["status", "content_hash"]).to_pylist()
    keys = {content_key(row["content_hash"]) for row in rows if row["content_hash"] and row["status"] in IN_TRAINING}
    return "".join(f"{key}\n" for key in sorted(keys))


def list_record(text: str) -> TrainingVolumesRecord:
    """Return what a lineage says of a list."""
    return TrainingVolumesRecord(sha256=hashlib.sha256(text.encode()).hexdigest(), volumes=text.count("\n"))


def write_volume_list(folder: Path, volumes: pa.Table) -> None:
    """Write the list of what is learnt from into a run's folder; one that is there and says the same is left alone."""
    text, path = volume_list(volumes), folder / VOLUMES_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def find_volume_list(folder: Path, record: TrainingVolumesRecord | None) -> str | None:
    """Return the list that a lineage names, from a model's folder, or from a checkpoint's or the run's above it.

    Returns:
        None if the lineage names none or it lies nowhere there.

    Raises:
        CheckpointError: What lies there is another one.
    """
    if record is None:
        return None
    for place in (folder, *list(folder.resolve().parents)[:_LEVELS]):
        path = place / VOLUMES_FILE
        if path.is_file():
            if path.stat().st_size > _MAX_BYTES:
                raise CheckpointError(f"{path} is larger than {_MAX_BYTES >> 20} MiB and no list of training volumes")
            text = path.read_text(encoding="utf-8", errors="replace")
            if list_record(text) != record:
                raise CheckpointError(
                    f"{path} is not the list that the weights were trained with: damaged, or of another corpus"
                )
            return text
    return None


def training_volumes(model: str | Path) -> frozenset[str] | None:
    """Return the keys (see `content_key`) of the volumes that an export or a training checkpoint was trained on.

    Returns:
        None where the model is neither, or says nothing of its volumes.

    Raises:
        CheckpointError: Its list is damaged.
    """
    folder = Path(model)
    if is_model_folder(folder):
        record = read_config(folder).lineage.training_volumes
    elif (folder / META_FILE).is_file():
        given = verify_checkpoint(folder, contents=False).meta.get("lineage", {}).get("training_volumes")
        where = f"{folder / META_FILE}: lineage.training_volumes"
        record = None if given is None else check_config(TrainingVolumesRecord, given, where)
    else:
        return None
    text = find_volume_list(folder, record)
    if record is not None and text is None:
        logger.warning(
            "%s names a list of %d training volumes, and %s is not there: nothing can be compared with what it has seen; copy "
            "the model folder again",
            *(folder, record.volumes, VOLUMES_FILE),
        )
    return None if text is None else frozenset(text.split())
