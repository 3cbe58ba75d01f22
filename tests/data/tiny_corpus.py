"""A few slices written as a corpus by hand: of schema 1 as earlier versions wrote it, or of today's."""

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meddino.core.files import canonical_json, sha256_file, write_json
from meddino.data.content import slice_hash
from meddino.data.manifests import SLICES_SCHEMA, VOLUMES_SCHEMA, corpus_hash
from meddino.data.sample import encode_slice

SLICES_SCHEMA_1 = pa.schema(
    [
        *[pa.field(name, pa.string(), nullable=False) for name in ("key", "volume_id")],
        pa.field("z_index", pa.int32(), nullable=False),
        pa.field("z_mm", pa.float64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        *[pa.field(name, pa.int64(), nullable=False) for name in ("offset", "length", "crc32")],
        *[pa.field(name, pa.int32(), nullable=False) for name in ("rows", "cols")],
        pa.field("spacing_mm", pa.list_(pa.float64(), 2), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        *[pa.field(name, pa.int16(), nullable=False) for name in ("hu_p01", "hu_p50", "hu_p99")],
        pa.field("body_fraction", pa.float32(), nullable=False),
    ]
)
VOLUMES_SCHEMA_1 = pa.schema(
    [field for field in VOLUMES_SCHEMA if field.name != "modality"]
    + [
        pa.field("study_key", pa.string()),
        pa.field("patient_is_known", pa.bool_()),
        pa.field("tilt_deg", pa.float64()),
        pa.field("slices_left_out", pa.map_(pa.string(), pa.int32())),
    ]
)


def write_corpus(
    root: Path,
    slices: list[np.ndarray],
    spacing_mm: tuple[float, float] = (0.8, 0.8),
    schema: int = 2,
    volumes: list[dict[str, Any]] | None = None,
    **info: Any,
) -> Path:
    """Write int16 slices as a corpus of two shards, four slices a volume.

    Args:
        root: New folder.
        slices: [rows, cols] in HU.
        spacing_mm: Of all.
        schema: 1 or 2.
        volumes: Columns of volumes.parquet that differ from the usual, by volume.
        info: More of corpus.json.
    """
    (root / "shards").mkdir(parents=True)
    half = len(slices) // 2
    rows: list[dict[str, Any]] = []
    hashes = {}
    for number, members in enumerate(part for part in (range(half), range(half, len(slices))) if len(part)):
        shard = root / "shards" / f"tiny-{number:06d}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            rows += [_add(tar, index, slices[index], spacing_mm, schema) | {"shard": shard.name} for index in members]
        hashes[shard.name] = {"sha256": sha256_file(shard), "bytes": shard.stat().st_size}
    slices_schema, volumes_schema = (SLICES_SCHEMA_1, VOLUMES_SCHEMA_1) if schema == 1 else (SLICES_SCHEMA, VOLUMES_SCHEMA)
    pq.write_table(pa.Table.from_pylist(rows, schema=slices_schema), root / "slices.parquet")
    usual = {"dataset": "tiny", "modality": "ct", "status": "accepted", "num_slices_kept": 4, "licence": "CC0-1.0"}
    written = [{"volume_id": f"v{number:03d}", **usual} for number in range((len(slices) + 3) // 4)]
    for row, more in zip(written, volumes or [], strict=False):
        row.update(more)
    pq.write_table(pa.Table.from_pylist(written, schema=volumes_schema), root / "volumes.parquet")
    content = corpus_hash({name: str(note["sha256"]) for name, note in hashes.items()})
    manifests = {name: sha256_file(root / name) for name in ("slices.parquet", "volumes.parquet")}
    values = {"schema_version": schema, "content_hash": content, "shards": hashes, "manifests": manifests}
    write_json(root / "corpus.json", {**values, "licences": ["CC0-1.0"], "sources": [{"name": "tiny"}], "config": {}, **info})
    return root


def _add(tar: tarfile.TarFile, index: int, values: np.ndarray, spacing_mm: tuple[float, float], schema: int) -> dict[str, Any]:
    key, data = f"s{index:05d}", encode_slice(values)
    where = {"volume_id": f"v{index // 4:03d}", "z_index": index % 4, "z_mm": 5.0 * (index % 4), "codec": "blosc2"}
    text = canonical_json({**where, "spacing_mm": spacing_mm, "thickness_mm": 5.0, "dataset": "tiny"}).encode()
    offset = tar.offset + 512
    for name, content in ((f"{key}.hu.b2" if schema == 1 else f"{key}.b2", data), (f"{key}.json", text)):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    prefix = "hu" if schema == 1 else "intensity"
    shares = {f"{prefix}_p{share:02d}": int(np.percentile(values, share)) for share in (1, 50, 99)}
    said = {} if schema == 1 else {"channels": 1, "dtype": "int16", "modality": "ct", "content_hash": slice_hash(values)}
    where |= {"key": key, "offset": offset, "length": len(data), "crc32": zlib.crc32(data), "body_fraction": 0.5}
    return {**where, **shares, **said, "rows": values.shape[0], "cols": values.shape[1], "spacing_mm": list(spacing_mm)}
