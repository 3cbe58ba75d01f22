"""Reading a corpus: its manifests, and any slice at random with one seek."""

import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meddino.core.errors import ShardError
from meddino.data.intensity import Modality
from meddino.data.manifests import SLICES_SCHEMA, VOLUMES_SCHEMA, read_info, read_manifest
from meddino.data.remote import is_url
from meddino.data.sample import DTYPES, SUFFIXES, Codec, decode_slice
from meddino.data.shard_files import LocalShards, RemoteShards, mirror_manifests


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
        self.info = read_info(self.root)
        self.slices = read_manifest(self.root / "slices.parquet", SLICES_SCHEMA, self.info["schema_version"])
        if self.slices.num_rows == 0:
            raise ShardError(f"corpus {self.location} holds no slices")
        self._columns: dict[str, NDArray[Any]] = {
            name: self.slices.column(name).to_numpy() for name in ("offset", "length", "crc32", "rows", "cols", "channels")
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
    def parts(self) -> "tuple[Corpus, ...]":
        """The corpora that are read as this one; a corpus from one place is its only part."""
        return (self,)

    @property
    def content_hash(self) -> str:
        """Hash that names the corpus by its content (see `corpus_hash`)."""
        return str(self.info["content_hash"])

    @cached_property
    def volumes(self) -> pa.Table:
        """The volume manifest, rejected ones included."""
        return read_manifest(self.root / "volumes.parquet", VOLUMES_SCHEMA, self.info["schema_version"])

    @cached_property
    def spacing_mm(self) -> NDArray[np.float64]:
        """[slices, 2]: spacing (y, x) of every slice; 1, 1 of one that says none: its pixels are taken for squares."""
        column = self.slices.column("spacing_mm").combine_chunks()
        spacing = np.ones((len(column), 2))
        spacing[column.is_valid().to_numpy(zero_copy_only=False)] = column.flatten().to_numpy().reshape(-1, 2)
        return spacing

    def modality(self, index: int) -> Modality:
        """Return of which modality a slice is."""
        modality: Modality = self.slices.column("modality")[index].as_py()
        return modality

    def value_range(self, index: int) -> tuple[float, float] | None:
        """Return the range that the values of a slice's volume are seen in; None where their unit says it (CT)."""
        low, high = (self.slices.column(name)[index].as_py() for name in ("value_low", "value_high"))
        return None if low is None or high is None else (low, high)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Return the modalities of its slices."""
        return tuple(sorted(self.slices.column("modality").unique().to_pylist()))

    def key(self, index: int) -> str:
        """Return the key of a slice."""
        return str(self.slices.column("key")[index].as_py())

    def read(self, index: int) -> NDArray[Any]:
        """Read one slice: one seek, one read, one decode.

        Args:
            index: Row of `slices.parquet`.

        Returns:
            Stored values [rows, cols], of a colour picture [rows, cols, channels]; of CT int16 in Hounsfield units.

        Raises:
            ShardError: The data is damaged or cannot be read.
        """
        name = self._shard_names[self._shard_numbers[index]]
        length = int(self._columns["length"][index])
        codec: Codec = self.slices.column("codec")[index].as_py()
        where = f"{self.location}/shards/{name}, sample {self.key(index)}"
        if codec not in SUFFIXES:
            raise ShardError(f"{where}: codec '{codec}' is unknown; allowed: {', '.join(SUFFIXES)}")
        dtype = str(self.slices.column("dtype")[index].as_py())
        if dtype not in DTYPES:
            raise ShardError(f"{where}: stored type '{dtype}' is unknown; allowed: {', '.join(DTYPES)}")
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
        rows, cols, channels = (int(self._columns[name][index]) for name in ("rows", "cols", "channels"))
        return decode_slice(data, codec, rows, cols, where, dtype, channels)
