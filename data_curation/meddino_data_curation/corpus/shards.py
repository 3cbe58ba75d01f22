"""Slices put together to shards: the same bytes whatever happened on the way."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from meddino.core.files import atomic_write, check_free_space, write_json
from meddino.data.sample import SUFFIXES, Codec, SliceInfo
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder

_BLOCK = 512  # of a tar


@dataclass(frozen=True)
class PlannedShard:
    """Which volumes lie in a shard, whole and in this order.

    Attributes:
        name: File name.
        volumes: (volume_id, job, bytes of its piece).
    """

    name: str
    volumes: tuple[tuple[str, str, int], ...]


def plan_shards(records: Sequence[VolumeRecord], size_bytes: int) -> list[PlannedShard]:
    """Fill shards one after the other with whole volumes.

    Args:
        records: Of the volumes that are kept, in the order of the corpus.
        size_bytes: A shard is closed once it holds this much pixel data.
    """
    shards: list[PlannedShard] = []
    volumes: list[tuple[str, str, int]] = []
    for number, record in enumerate(records):
        volumes.append((record.row["volume_id"], record.job, record.piece_bytes))
        if sum(length for _, _, length in volumes) >= size_bytes or number == len(records) - 1:
            shards.append(PlannedShard(f"slices-{len(shards):06d}.tar", tuple(volumes)))
            volumes = []
    return shards


def drop_stale_shards(corpus: Path, work: WorkFolder, plan: Sequence[PlannedShard]) -> set[str]:
    """Delete shards that a changed plan has no use for.

    Returns:
        Ids of the volumes that lie in a finished shard as planned.
    """
    planned = {shard.name: [list(volume) for volume in shard.volumes] for shard in plan}
    placed: set[str] = set()
    notes = work.shard_notes()
    for name, note in notes.items():
        path = corpus / "shards" / name
        if planned.get(name) == note["volumes"] and path.is_file() and path.stat().st_size == note["bytes"]:
            placed.update(volume_id for volume_id, _, _ in note["volumes"])
        else:
            path.unlink(missing_ok=True)
            work.shard_note(name).unlink()
    for path in (corpus / "shards").glob("*"):
        if path.name not in notes:
            path.unlink()
    return placed


def write_shards(
    corpus: Path, work: WorkFolder, plan: Sequence[PlannedShard], codec: Codec, threads: int
) -> dict[str, dict[str, Any]]:
    """Write the shards that are not there yet; pieces are deleted once their shard is safe.

    Args:
        corpus: Folder to write.
        work: Has the pieces.
        plan: What goes where.
        codec: How the pieces' slices are stored.
        threads: Shards written at once; copying and hashing leave Python's lock alone.

    Returns:
        By name: sha256, bytes, volumes, offsets (of each slice's pixel data).

    Raises:
        OSError: A full disk.
    """
    (corpus / "shards").mkdir(parents=True, exist_ok=True)
    notes = work.shard_notes()
    with ThreadPoolExecutor(threads) as pool:
        missing = [shard for shard in plan if shard.name not in notes]
        written = pool.map(lambda shard: _write_shard(corpus, work, shard, codec), missing)
        for shard, note in zip(missing, written, strict=True):
            notes[shard.name] = note
    return {shard.name: notes[shard.name] for shard in plan}


def _write_shard(corpus: Path, work: WorkFolder, shard: PlannedShard, codec: Codec) -> dict[str, Any]:
    check_free_space(corpus, sum(length for _, _, length in shard.volumes), "a shard")
    samples = (sample for volume_id, _, _ in shard.volumes for sample in _samples(work, volume_id, codec))
    note = write_shard(corpus / "shards" / shard.name, samples)
    note["volumes"] = [list(volume) for volume in shard.volumes]
    write_json(work.shard_note(shard.name), note)
    for volume_id, _, _ in shard.volumes:
        work.piece(volume_id).unlink()
    return note


def _samples(work: WorkFolder, volume_id: str, codec: Codec) -> Iterator[tuple[str, SliceInfo, bytes]]:
    record = work.finished_record(volume_id)
    row, slices = record.row, record.slices
    with work.piece(volume_id).open("rb") as piece:
        for number, key in enumerate(slices["key"]):
            z_mm, spacing, thickness = (slices[name][number] for name in ("z_mm", "spacing_mm", "thickness_mm"))
            where = (volume_id, slices["z_index"][number], z_mm, spacing and tuple(spacing), thickness)
            info = SliceInfo(*where, row["dataset"], codec, row["modality"])
            yield key, info, piece.read(slices["length"][number])


def write_shard(path: Path, samples: Iterable[tuple[str, SliceInfo, bytes]]) -> dict[str, Any]:
    """Write one shard with nothing in its headers that could differ between two runs.

    Args:
        path: The tar.
        samples: Key, description and pixel data of each slice, in their order.

    Returns:
        sha256, bytes, and offsets: of each slice's pixel data.
    """
    from webdataset import TarWriter  # imports torch

    offsets: list[int] = []
    with atomic_write(path) as stream:
        hashed = _Hashed(stream)
        with TarWriter(hashed, user="", group="", mode=0o644, encoder=False, mtime=0) as writer:
            for key, info, data in samples:
                members = {SUFFIXES[info.codec]: data, "json": info.to_json()}
                at = writer.tarstream.offset + _BLOCK
                for suffix in sorted(members):  # TarWriter's order
                    if suffix != "json":
                        offsets.append(at)
                    at += _BLOCK - (-len(members[suffix]) // _BLOCK) * _BLOCK
                writer.write({"__key__": key, **members})
    return {"sha256": hashed.digest.hexdigest(), "bytes": path.stat().st_size, "offsets": offsets}


class _Hashed:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)
