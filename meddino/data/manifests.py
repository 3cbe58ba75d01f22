"""The manifests of a corpus: their columns, and how those of an older schema become today's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meddino.core.errors import ShardError

SCHEMA_VERSION = 2
READ_VERSIONS = (1, 2)

SLICES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("volume_id", pa.string(), nullable=False),
        pa.field("z_index", pa.int32(), nullable=False),
        pa.field("z_mm", pa.float64()),  # null where a picture has no place in a body
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the pixel data's first byte in the tar
        pa.field("length", pa.int64(), nullable=False),  # bytes of pixel data
        pa.field("crc32", pa.int64(), nullable=False),  # of the pixel data as stored: a flipped bit may decode without a murmur
        pa.field("content_hash", pa.string()),  # of the stored values, see `content.slice_hash`; null in schema 1
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("cols", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),  # 1, or 3 of a colour picture
        pa.field("dtype", pa.string(), nullable=False),  # of the stored values
        pa.field("codec", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),  # ct | mr | image
        pa.field("spacing_mm", pa.list_(pa.float64(), 2)),  # y, x
        pa.field("thickness_mm", pa.float64()),  # distance to the next slice of the volume
        pa.field("intensity_p01", pa.float32(), nullable=False),  # of the slice, in stored values
        pa.field("intensity_p50", pa.float32(), nullable=False),
        pa.field("intensity_p99", pa.float32(), nullable=False),
        pa.field("value_low", pa.float64()),  # range that the whole volume's values are seen in; null where their unit says it
        pa.field("value_high", pa.float64()),
        pa.field("body_fraction", pa.float32(), nullable=False),
    ]
)

VOLUMES_SCHEMA = pa.schema(
    [
        pa.field("volume_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),  # ct | mr | image
        pa.field("status", pa.string(), nullable=False),  # accepted | rejected | duplicate | erased
        pa.field("reason", pa.string()),
        pa.field("notes", pa.string()),
        pa.field("duplicate_of", pa.string()),
        pa.field("duplicate_kind", pa.string()),  # exact | near
        pa.field("patient_key", pa.string()),
        pa.field("series_key", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("shape", pa.list_(pa.int32(), 3)),
        pa.field("spacing_mm", pa.list_(pa.float64(), 3)),
        pa.field("num_slices_kept", pa.int32(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("format", pa.string()),
    ]
)

# What schema 1 did not say: it held CT only.
_OF_SCHEMA_1: dict[str, Any] = {"modality": "ct", "dtype": "int16", "channels": 1}
_RENAMED = {f"hu_{share}": f"intensity_{share}" for share in ("p01", "p50", "p99")}


def corpus_hash(shard_hashes: dict[str, str]) -> str:
    """Return the hash that names a corpus by its content: SHA-256 over the shards' names and SHA-256 sums."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(shard_hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def read_info(root: Path) -> dict[str, Any]:
    """Read corpus.json.

    Raises:
        ShardError: It is no corpus, an unfinished one, or of a version that this program does not read.
    """
    path = root / "corpus.json"
    if not root.is_dir():
        raise ShardError(f"no corpus at {root}: no such folder; make one with `meddino-curate build SOURCE --out {root}`")
    if not path.is_file():
        raise ShardError(
            f"{root} is no finished corpus: corpus.json is missing; run the `meddino-curate` command that writes it to its end"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path} is damaged: {error}") from error
    version = info.get("schema_version") if isinstance(info, dict) else None
    if version not in READ_VERSIONS:
        known = ", ".join(str(number) for number in READ_VERSIONS)
        raise ShardError(f"{path}: schema version {version} found, this program reads versions {known}; curate it again")
    return dict(info)


def read_manifest(path: Path, schema: pa.Schema, version: int) -> pa.Table:
    """Read a manifest of any version as one of today's; further columns are kept.

    Args:
        path: slices.parquet or volumes.parquet.
        schema: The columns that it has to have.
        version: Schema version of its corpus.

    Raises:
        ShardError: It is missing or damaged, or lacks a column.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path} is missing or damaged: {error}") from error
    if version == 1:
        table = _from_schema_1(table, schema)
    lacking = [name for name in schema.names if name not in table.column_names]
    if lacking:
        raise ShardError(f"{path} lacks the columns {', '.join(lacking)}")
    return table


def _from_schema_1(table: pa.Table, schema: pa.Schema) -> pa.Table:
    table = table.rename_columns([_RENAMED.get(name, name) for name in table.column_names])
    for field in schema:
        if field.name in table.column_names:
            continue
        if field.name in _OF_SCHEMA_1:
            values = pa.array([_OF_SCHEMA_1[field.name]] * table.num_rows, field.type)
        elif field.nullable:
            values = pa.nulls(table.num_rows, field.type)
        else:
            continue  # lacking then as in any version
        table = table.append_column(field, values)
    return table
