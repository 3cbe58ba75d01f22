"""Pieces of volumes put together to shards: the same bytes whatever happened on the way."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from meddino.core.files import atomic_write, check_free_space, sha256_file, write_json
from meddino_data_curation.corpus.tar_members import END_OF_ARCHIVE
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class PlannedShard:
    """Which volumes lie in a shard, whole and in this order.

    Attributes:
        name: File name.
        volumes: (volume_id, job, bytes of its piece).
    """

    name: str
    volumes: tuple[tuple[str, str, int], ...]

    def offsets(self) -> dict[str, int]:
        """Return where each volume's piece begins."""
        places, at = {}, 0
        for volume_id, _, length in self.volumes:
            places[volume_id] = at
            at += length
        return places


def plan_shards(records: Sequence[VolumeRecord], size_bytes: int) -> list[PlannedShard]:
    """Fill shards one after the other with whole volumes.

    Args:
        records: Of the volumes that are kept, sorted by id.
        size_bytes: A shard is closed once it holds this much.
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


def write_shards(corpus: Path, work: WorkFolder, plan: Sequence[PlannedShard], threads: int) -> dict[str, dict[str, object]]:
    """Write the shards that are not there yet; pieces are deleted once their shard is safe.

    Args:
        corpus: Folder to write.
        work: Has the pieces.
        plan: What goes where.
        threads: Shards written at once; copying and hashing leave Python's lock alone.

    Returns:
        By name: sha256, bytes, volumes.

    Raises:
        OSError: A full disk.
    """
    (corpus / "shards").mkdir(parents=True, exist_ok=True)
    notes = work.shard_notes()
    with ThreadPoolExecutor(threads) as pool:
        missing = [shard for shard in plan if shard.name not in notes]
        for shard, note in zip(missing, pool.map(lambda shard: _write_shard(corpus, work, shard), missing), strict=True):
            notes[shard.name] = note
    return {shard.name: notes[shard.name] for shard in plan}


def _write_shard(corpus: Path, work: WorkFolder, shard: PlannedShard) -> dict[str, object]:
    path = corpus / "shards" / shard.name
    check_free_space(corpus, sum(length for _, _, length in shard.volumes), "a shard")
    digest = hashlib.sha256()
    with atomic_write(path) as stream:
        for volume_id, _, _ in shard.volumes:
            with work.piece(volume_id).open("rb") as piece:
                while block := piece.read(_COPY_BYTES):
                    digest.update(block)
                    stream.write(block)
        digest.update(END_OF_ARCHIVE)
        stream.write(END_OF_ARCHIVE)
    note: dict[str, object] = {
        "sha256": digest.hexdigest(),
        "bytes": path.stat().st_size,
        "volumes": [list(volume) for volume in shard.volumes],
    }
    write_json(work.shard_note(shard.name), note)
    for volume_id, _, _ in shard.volumes:
        work.piece(volume_id).unlink()
    return note


def damaged_shards(corpus: Path, shards: dict[str, dict[str, object]]) -> list[str]:
    """Return the names of shards whose bytes are not those that were written."""
    return [name for name, note in shards.items() if sha256_file(corpus / "shards" / name) != note["sha256"]]
