"""Reading a corpus: its manifests, and any slice at random with one seek."""

import hashlib
import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddino.core.errors import ShardError
from meddino.data.remote import is_url
from meddino.data.sample import SUFFIXES, Codec, decode_slice
from meddino.data.shard_files import LocalShards, RemoteShards, mirror_manifests

SCHEMA_VERSION = 1

SLICES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("volume_id", pa.string(), nullable=False),
        pa.field("z_index", pa.int32(), nullable=False),
        pa.field("z_mm", pa.float64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the pixel data's first byte in the tar
        pa.field("length", pa.int64(), nullable=False),  # bytes of pixel data
        pa.field("crc32", pa.int64(), nullable=False),  # of the pixel data as stored: a flipped bit may decode without a murmur
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("cols", pa.int32(), nullable=False),
        pa.field("spacing_mm", pa.list_(pa.float64(), 2), nullable=False),  # y, x
        pa.field("codec", pa.string(), nullable=False),
        pa.field("hu_p01", pa.int16(), nullable=False),
        pa.field("hu_p50", pa.int16(), nullable=False),
        pa.field("hu_p99", pa.int16(), nullable=False),
        pa.field("body_fraction", pa.float32(), nullable=False),
    ]
)

VOLUMES_SCHEMA = pa.schema(
    [
        pa.field("volume_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # accepted | rejected | duplicate
        pa.field("reason", pa.string()),
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


def corpus_hash(shard_hashes: dict[str, str]) -> str:
    """Return the hash that names a corpus by its content: SHA-256 over the shards' names and SHA-256 sums."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(shard_hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


class Corpus:
    """What `meddino-curate build` wrote, in a folder or behind a URL.

    Safe to use from several processes after a fork or spawn: files are opened where they are first read.

    Attributes:
        root: The folder; of a URL, the local one that its manifests are kept in.
        location: The folder or the URL, for messages.
        shards: Where the slices' bytes come from.
        info: The content of corpus.json.
        slices: The slice manifest.
    """

    def __init__(self, root: Path | str) -> None:
        """Open a corpus and read its slice manifest.

        Args:
            root: The folder with `corpus.json`, or its URL: http, https, s3. Of a URL, manifests and the slices that
                were read are kept on the local disk (see `meddino.data.slice_cache`).

        Raises:
            ShardError: It is no corpus, an unfinished one, of another version, or lacks a shard; or it is behind a URL
                whose server cannot be reached or gives no parts of files.
        """
        self.location = str(root)
        self.shards: LocalShards | RemoteShards
        if is_url(root):
            mirror = mirror_manifests(str(root))
            self.root, self.location = mirror.folder, mirror.remote.url
            self.shards = RemoteShards(mirror)
        else:
            self.root = Path(root)
            self.shards = LocalShards(self.root / "shards")
        self.info = _read_info(self.root)
        self.slices = _read_table(self.root / "slices.parquet", SLICES_SCHEMA)
        if self.slices.num_rows == 0:
            raise ShardError(f"corpus {self.location} holds no slices")
        self._columns: dict[str, NDArray[Any]] = {
            name: self.slices.column(name).to_numpy() for name in ("offset", "length", "crc32", "rows", "cols")
        }
        shards = self.slices.column("shard").dictionary_encode().combine_chunks()
        self._shard_names: list[str] = shards.dictionary.to_pylist()
        self._shard_numbers = shards.indices.to_numpy()
        strange = [name for name in self._shard_names if Path(name).name != name]
        if strange:
            raise ShardError(f"corpus {self.location}: shard name {strange[0]!r} leads out of its folder")
        missing = self.shards.missing(self._shard_names)
        if missing:
            found = f"{len(missing)} of {len(self._shard_names)} shards, e.g. shards/{missing[0]}"
            raise ShardError(f"corpus {self.location} lacks {found}")

    def __len__(self) -> int:
        """Return the number of slices."""
        return int(self.slices.num_rows)

    @property
    def content_hash(self) -> str:
        """Hash that names the corpus by its content (see `corpus_hash`)."""
        return str(self.info["content_hash"])

    @cached_property
    def volumes(self) -> pa.Table:
        """The volume manifest, rejected ones included."""
        return _read_table(self.root / "volumes.parquet", VOLUMES_SCHEMA)

    @cached_property
    def spacing_mm(self) -> NDArray[np.float64]:
        """[slices, 2]: spacing (y, x) of every slice."""
        flat = self.slices.column("spacing_mm").combine_chunks().flatten().to_numpy()
        return np.asarray(flat, dtype=np.float64).reshape(-1, 2)

    def key(self, index: int) -> str:
        """Return the key of a slice."""
        return str(self.slices.column("key")[index].as_py())

    def read(self, index: int) -> NDArray[np.int16]:
        """Read one slice: one seek, one read, one decode.

        Args:
            index: Row of `slices.parquet`.

        Returns:
            int16 [rows, cols] in Hounsfield units.

        Raises:
            ShardError: The data is damaged or cannot be read.
        """
        name = self._shard_names[self._shard_numbers[index]]
        length = int(self._columns["length"][index])
        codec: Codec = self.slices.column("codec")[index].as_py()
        where = f"{self.location}/shards/{name}, sample {self.key(index)}"
        if codec not in SUFFIXES:
            raise ShardError(f"{where}: codec '{codec}' is unknown; allowed: {', '.join(SUFFIXES)}")
        offset, crc32 = int(self._columns["offset"][index]), int(self._columns["crc32"][index])
        try:
            data = self.shards.read(name, offset, length, crc32)
        except OSError as error:
            raise ShardError(f"{where}: cannot be read ({error})") from error
        if len(data) != length:
            raise ShardError(f"{where}: the shard ends early ({len(data)} of {length} bytes)")
        if zlib.crc32(data) != crc32:
            raise ShardError(
                f"{where}: checksum mismatch, the shard is damaged; "
                f"`meddino-curate verify {self.location}` lists all such places"
            )
        return decode_slice(data, codec, int(self._columns["rows"][index]), int(self._columns["cols"][index]), where)


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "corpus.json"
    if not root.is_dir():
        raise ShardError(f"no corpus at {root}: no such folder; make one with `meddino-curate build SOURCE --out {root}`")
    if not path.is_file():
        raise ShardError(
            f"{root} is no finished corpus: corpus.json is missing; run its `meddino-curate build` again to its end"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path} is damaged: {error}") from error
    version = info.get("schema_version") if isinstance(info, dict) else None
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema version {version} found, this program reads version {SCHEMA_VERSION}; curate it again"
        )
    return dict(info)


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path} is missing or damaged: {error}") from error
    lacking = [name for name in schema.names if name not in table.column_names]
    if lacking:
        raise ShardError(f"{path} lacks the columns {', '.join(lacking)}")
    return table
