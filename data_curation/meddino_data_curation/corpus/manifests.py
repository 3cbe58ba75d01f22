"""slices.parquet, volumes.parquet and corpus.json."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import meddino
from meddino.core.files import atomic_write, sha256_file, write_json
from meddino.data.manifests import SCHEMA_VERSION, SLICES_SCHEMA, VOLUMES_SCHEMA, corpus_hash
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.shards import PlannedShard
from meddino_data_curation.corpus.work_folder import WorkFolder
from meddino_data_curation.selection.fingerprint import Fingerprint
from meddino_data_curation.sources.patient_ids import RULES_VERSION

_ROWS_PER_GROUP = 65536
REPORT = "report.html"
CHECKED = ("slices.parquet", "volumes.parquet", "fingerprints.parquet", REPORT)

VOLUMES_WRITTEN = pa.schema(
    [
        *VOLUMES_SCHEMA,
        pa.field("study_key", pa.string()),
        pa.field("patient_is_known", pa.bool_()),  # patient_key means the same person in every source
        pa.field("patient_is_named", pa.bool_()),  # false: patient_key stands for a study or a file, no id tells
        pa.field("position_mm", pa.float64()),  # of the first slice along the patient's axis, as headers say it
        pa.field("tilt_deg", pa.float64()),
        pa.field("slices_left_out", pa.map_(pa.string(), pa.int32())),  # by reason
    ]
)


def write_slices(
    path: Path, work: WorkFolder, plan: Sequence[PlannedShard], notes: Mapping[str, Mapping[str, Any]], codec: str
) -> int:
    """Write slices.parquet in the order of the shards, a few volumes in memory at a time.

    Args:
        path: The manifest.
        work: Has the records of the volumes.
        plan: The shards.
        notes: What `write_shards` says of them.
        codec: How slices are stored.

    Returns:
        The number of slices.
    """
    total = 0
    with atomic_write(path) as stream, pq.ParquetWriter(stream, SLICES_SCHEMA, compression="zstd") as writer:
        for table in _slice_tables(work, plan, notes, codec):
            writer.write_table(table)
            total += table.num_rows
    return total


def _slice_tables(
    work: WorkFolder, plan: Sequence[PlannedShard], notes: Mapping[str, Mapping[str, Any]], codec: str
) -> Iterator[pa.Table]:
    columns: dict[str, list[Any]] = {name: [] for name in SLICES_SCHEMA.names}
    for shard in plan:
        offsets = iter(notes[shard.name]["offsets"])
        for volume_id, _, _ in shard.volumes:
            record = work.finished_record(volume_id)
            count = len(record.slices["key"])
            same = {"volume_id": volume_id, "shard": shard.name, "codec": codec, "modality": record.row["modality"]}
            for name in SLICES_SCHEMA.names:
                if name == "offset":
                    columns[name] += islice(offsets, count)
                else:
                    columns[name] += [same[name]] * count if name in same else record.slices[name]
        if len(columns["key"]) >= _ROWS_PER_GROUP:
            yield pa.table(columns, schema=SLICES_SCHEMA)
            columns = {name: [] for name in SLICES_SCHEMA.names}
    yield pa.table(columns, schema=SLICES_SCHEMA)


def write_volumes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write volumes.parquet, sorted by content, those without any last."""
    ordered = sorted(rows, key=lambda row: (row["content_hash"] is None, str(row["content_hash"]), str(row["volume_id"])))
    columns = {name: [row[name] for row in ordered] for name in VOLUMES_WRITTEN.names}
    columns["slices_left_out"] = [sorted(counts.items()) for counts in columns["slices_left_out"]]
    table = pa.table(columns, schema=VOLUMES_WRITTEN)
    with atomic_write(path) as stream:
        pq.write_table(table, stream, compression="zstd")


FINGERPRINTS_SCHEMA = pa.schema(
    [
        pa.field("volume_id", pa.string(), nullable=False),
        pa.field("places_mm", pa.list_(pa.float64()), nullable=False),
        pa.field("vectors", pa.binary(), nullable=False),  # int8 [len(places_mm), 255]
    ]
)


def write_fingerprints(path: Path, prints: Mapping[str, Fingerprint]) -> None:
    """Write fingerprints.parquet, with which audits find near duplicates without reading a slice."""
    columns: dict[str, list[Any]] = {"volume_id": sorted(prints), "places_mm": [], "vectors": []}
    for volume_id in columns["volume_id"]:
        columns["places_mm"].append(prints[volume_id].places_mm.tolist())
        columns["vectors"].append(prints[volume_id].vectors.tobytes())
    with atomic_write(path) as stream:
        pq.write_table(pa.table(columns, schema=FINGERPRINTS_SCHEMA), stream, compression="zstd")


def read_fingerprints(path: Path) -> dict[str, Fingerprint]:
    """Read fingerprints.parquet; nothing where there is none (near duplicates were switched off)."""
    if not path.is_file():
        return {}
    return {
        row["volume_id"]: Fingerprint(
            np.asarray(row["places_mm"]), np.frombuffer(row["vectors"], dtype=np.int8).reshape(len(row["places_mm"]), -1)
        )
        for row in pq.read_table(path).to_pylist()
    }


def write_corpus_json(
    corpus: Path,
    config: CurationConfig,
    rows: Sequence[Mapping[str, Any]],
    shards: Mapping[str, Mapping[str, Any]],
    num_slices: int,
    salt_fingerprint: str,
    audits: Sequence[Mapping[str, Any]],
    lists: Sequence[Mapping[str, Any]],
    files: Mapping[str, int],
    history: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write corpus.json, the last file: with it the corpus is finished.

    Returns:
        Its content.
    """
    status = Counter(str(row["status"]) for row in rows)
    info = {
        "format": "meddino-corpus",
        "schema_version": SCHEMA_VERSION,
        "tool_version": meddino.__version__,
        "content_hash": corpus_hash({name: str(note["sha256"]) for name, note in shards.items()}),
        "config": config.public(),
        "codec": config.shards.codec,
        "salt_fingerprint": salt_fingerprint,
        "totals": {
            "volumes": len(rows),
            "accepted": status["accepted"],
            "rejected": status["rejected"],
            "duplicate": status["duplicate"],
            "erased": status["erased"],
            "slices": num_slices,
            "shard_bytes": sum(int(note["bytes"]) for note in shards.values()),
        },
        "shards": {
            name: {"sha256": note["sha256"], "bytes": note["bytes"], "volumes": len(note["volumes"])}
            for name, note in shards.items()
        },
        "manifests": {name: sha256_file(corpus / name) for name in CHECKED if (corpus / name).is_file()},
        "patient_ids": RULES_VERSION,
        "files": dict(files),
        "history": list(history),
        "audit": list(audits),
        "exclusion_lists": list(lists),
        "licences": sorted({str(row["licence"]) for row in rows if row["status"] == "accepted"}),
        "sources": [_source_totals(source.name, source.licence_text, source.citation, rows) for source in config.sources],
    }
    write_json(corpus / "corpus.json", info)
    return info


def _source_totals(name: str, licence: str, citation: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["dataset"] == name]
    status = Counter(str(row["status"]) for row in own)
    return {
        "name": name,
        "licence": licence,
        "citation": citation,
        "accepted": status["accepted"],
        "rejected": status["rejected"],
        "duplicate": status["duplicate"],
        "slices": sum(int(row["num_slices_kept"]) for row in own if row["status"] == "accepted"),
        **patients_of(own),
    }


def patients_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many patients kept volumes are of, and of how many volumes no id tells the patient."""
    kept = [row for row in rows if row["status"] == "accepted"]
    unknown = [row for row in kept if row["patient_key"] is None or row.get("patient_is_named") is False]
    known = {row["patient_key"] for row in kept} - {row["patient_key"] for row in unknown}
    return {"patients": len(known), "volumes_of_unknown_patients": len(unknown)}


def patients_text(counts: Mapping[str, int]) -> str:
    """Return `patients_of` in words."""
    unknown = counts["volumes_of_unknown_patients"]
    told = f"{unknown} volumes of unknown patients" if unknown else ""
    return "; ".join(filter(None, (str(counts["patients"]) if counts["patients"] or not unknown else "", told)))
