"""Where the bytes of slices come from: shards in a folder, or behind a URL with a cache before it."""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from meddino.core.errors import ShardError
from meddino.core.files import atomic_write, sha256_file
from meddino.data.remote import RemoteFolder
from meddino.data.slice_cache import SliceCache, cache_folder, cache_limit_bytes

MAX_OPEN_SHARDS = 64
MIRRORED = ("slices.parquet", "volumes.parquet")


class LocalShards:
    """Shards in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when sent to another process."""
        return {**self.__dict__, "_files": OrderedDict()}

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the shards that are not there."""
        return [name for name in names if not (self.folder / name).is_file()]

    def read(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        """Return bytes of a shard; fewer than `length` where it ends before. `crc32` is compared by the caller.

        Raises:
            OSError: It cannot be read.
        """
        # Not seek and read: a forked process shares the position in files that were open before the fork.
        return os.pread(self._open(name).fileno(), length, offset)

    def sha256(self, name: str, length: int) -> str:
        """Return the SHA-256 of a shard's file, whatever its length; "" where there is none."""
        path = self.folder / name
        return sha256_file(path) if path.is_file() else ""

    def names(self) -> list[str]:
        """Return what lies in the folder, sorted."""
        return sorted(path.name for path in self.folder.iterdir())

    def _open(self, name: str) -> IO[bytes]:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if len(self._files) >= MAX_OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        stream = (self.folder / name).open("rb", buffering=0)
        self._files[name] = stream
        return stream


@dataclass(frozen=True)
class Mirror:
    """The manifests of a corpus behind a URL, kept in a local folder.

    Attributes:
        remote: Its files.
        folder: Holds corpus.json and the manifests, and below slices/ what was read of the shards.
        info: The content of corpus.json.
    """

    remote: RemoteFolder
    folder: Path
    info: dict[str, Any]


def mirror_manifests(url: str) -> Mirror:
    """Fetch the manifests of a corpus that are not there yet or have changed, and compare their checksums.

    Raises:
        ShardError: No corpus lies there, the server cannot be reached or gives no parts of files, or a checksum differs.
    """
    remote = RemoteFolder(url)
    remote.check_ranges("corpus.json")
    data = remote.read("corpus.json")
    try:
        info = json.loads(data)
        manifests = {str(name): str(digest) for name, digest in info["manifests"].items()}
        content_hash = str(info["content_hash"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{remote.url}/corpus.json is damaged, or not of a corpus ({error})") from error
    named = hashlib.sha256(f"{remote.url}\n{content_hash}".encode()).hexdigest()[:32]
    folder = cache_folder() / "corpora" / named
    for name in MIRRORED:  # fingerprints and report are not read in training, and may be large
        path, digest = folder / name, manifests.get(name, "")
        if not path.is_file() or sha256_file(path) != digest:
            _fetch(remote, name, path, digest)
    if not (folder / "corpus.json").is_file() or (folder / "corpus.json").read_bytes() != data:
        with atomic_write(folder / "corpus.json") as stream:
            stream.write(data)
    return Mirror(remote, folder, info)


def _fetch(remote: RemoteFolder, name: str, path: Path, digest: str) -> None:
    data = remote.read(name)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ShardError(f"{remote.url}/{name}: its checksum is not the one in corpus.json; the corpus is damaged or changing")
    with atomic_write(path) as stream:
        stream.write(data)


class RemoteShards:
    """Shards behind a URL; each slice that was read is kept in a local cache."""

    def __init__(self, mirror: Mirror) -> None:
        self.remote = mirror.remote
        self._bytes = {str(name): int(note["bytes"]) for name, note in mirror.info.get("shards", {}).items()}
        self.cache = SliceCache(mirror.folder / "slices", cache_limit_bytes())

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the shards that corpus.json does not know; whether they are there shows when they are read."""
        return [name for name in names if name not in self._bytes]

    def read(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        """Return bytes of a shard from the cache or else by one range request; damaged ones are fetched once more.

        Raises:
            ShardError: The server cannot be reached or lacks the shard.
        """
        kept_as = f"{name}/{offset}-{length}"
        data = self.cache.get(kept_as)
        if data is not None and zlib.crc32(data) == crc32:
            return data
        data = self.remote.read_range(f"shards/{name}", offset, length)
        if zlib.crc32(data) == crc32:
            self.cache.put(kept_as, data)
        else:
            self.cache.drop(kept_as)
        return data

    def sha256(self, name: str, length: int) -> str:
        """Return the SHA-256 of a shard; "" where there is none or it has another length."""
        found = self.remote.size(f"shards/{name}")
        if found is None:
            return ""
        return self.remote.sha256(f"shards/{name}", length) if found == length else f"{found} bytes instead of {length}"

    def names(self) -> list[str]:
        """Return the shards that corpus.json knows: a server cannot be asked for others."""
        return sorted(self._bytes)
