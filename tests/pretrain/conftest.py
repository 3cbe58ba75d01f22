"""A tiny corpus, written from the contract alone: what `meddino-curate build` would leave behind."""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jaxtyping import install_import_hook

from meddino.core.files import sha256_file, write_json
from meddino.data.corpus import SCHEMA_VERSION, SLICES_SCHEMA, VOLUMES_SCHEMA, Corpus, corpus_hash
from meddino.data.sample import SliceInfo, encode_slice

# Shapes and types are checked here where tensors come into being; the trainer's own modules are not tensor functions.
CHECKED = "augment batches crops fixed_slices gram_choice health health_pictures loader masks patch_quality sample_order"
install_import_hook([f"meddino_pretrain.{module}" for module in CHECKED.split()], "beartype.beartype")


def disc_slice(number: int, rows: int, cols: int) -> np.ndarray:
    """A body (40 HU) with two lungs, a spine and a texture of its own in air."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : cols * 1j]
    hu = np.full((rows, cols), -1000.0)
    hu[(y / 0.8) ** 2 + (x / 0.9) ** 2 < 1] = 40
    for side in (-0.4, 0.4):
        hu[((y + 0.1) / 0.4) ** 2 + ((x - side) / (0.2 + 0.1 * rng.random())) ** 2 < 1] = -800
    hu[(y - 0.5) ** 2 + x**2 < 0.02] = 600
    return (hu + rng.normal(0, 15, hu.shape)).astype(np.int16)


def write_corpus(root: Path, slices: list[np.ndarray], spacing_mm: tuple[float, float] = (0.8, 0.8)) -> Path:
    """Write slices as a corpus of two shards, four slices a volume."""
    (root / "shards").mkdir(parents=True)
    halves = [range(len(slices))[: len(slices) // 2], range(len(slices))[len(slices) // 2 :]]
    rows: list[dict] = []
    hashes = {}
    for number, members in enumerate(half for half in halves if len(half)):
        shard = root / "shards" / f"tiny-{number:06d}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in members:
                key, data = f"s{i:05d}", encode_slice(slices[i])
                info = SliceInfo(f"v{i // 4:03d}", i % 4, 5.0 * (i % 4), spacing_mm, 5.0, "tiny", "blosc2")
                for name, content in ((f"{key}.hu.b2", data), (f"{key}.json", info.to_json())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    offset = tar.offset + 512
                    tar.addfile(member, io.BytesIO(content))
                    if content is data:
                        place = offset
                p01, p50, p99 = (int(v) for v in np.percentile(slices[i], (1, 50, 99)))
                rows.append(
                    {"key": key, "volume_id": info.volume_id, "z_index": info.z_index, "z_mm": info.z_mm, "shard": shard.name}
                    | {"offset": place, "length": len(data), "crc32": zlib.crc32(data), "codec": "blosc2"}
                    | {"rows": slices[i].shape[0], "cols": slices[i].shape[1], "spacing_mm": list(spacing_mm)}
                    | {"hu_p01": p01, "hu_p50": p50, "hu_p99": p99, "body_fraction": 0.5}
                )
        hashes[shard.name] = sha256_file(shard)
    pq.write_table(pa.Table.from_pylist(rows, schema=SLICES_SCHEMA), root / "slices.parquet")
    volumes = [
        {"volume_id": f"v{v:03d}", "dataset": "tiny", "status": "accepted", "num_slices_kept": 4, "licence": "CC0-1.0"}
        for v in range((len(slices) + 3) // 4)
    ]
    pq.write_table(pa.Table.from_pylist(volumes, schema=VOLUMES_SCHEMA), root / "volumes.parquet")
    info = {"schema_version": SCHEMA_VERSION, "content_hash": corpus_hash(hashes), "shards": hashes, "licences": ["CC0-1.0"]}
    write_json(root / "corpus.json", info)
    return root


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Return a function that writes a corpus of `count` slices of a size and opens it."""

    def make(
        count: int = 24, rows: int = 96, cols: int = 80, spacing_mm: tuple[float, float] = (0.8, 0.8), name: str = "corpus"
    ) -> Corpus:
        slices = [disc_slice(i, rows, cols) for i in range(count)]
        return Corpus(write_corpus(tmp_path / name, slices, spacing_mm))

    return make


@pytest.fixture(scope="session")
def make_corpus_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one corpus of 24 slices, for tests that only read it."""
    return write_corpus(tmp_path_factory.mktemp("tiny") / "corpus", [disc_slice(i, 96, 80) for i in range(24)])


@pytest.fixture
def write_slices() -> Callable[..., Path]:
    """A function that writes given slices as a corpus: `write_slices(folder, slices)`."""
    return write_corpus
