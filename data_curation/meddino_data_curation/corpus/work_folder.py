"""The unfinished corpus: what every volume left behind, so that an interrupted run goes on where it stood."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.core.files import PARTIAL_SUFFIX, atomic_write, canonical_json, write_json

WORK_NAME = ".work"
NEXT = "next"  # the next edition of a finished corpus, while it is written
READY = "READY"  # stands in it once it is whole
RECORD_VERSION = 5  # another number makes every volume be read again


@dataclass
class VolumeRecord:
    """What became of one volume.

    Attributes:
        job: Hash of everything that decides the result; another one means the volume has to be read again.
        row: Columns of volumes.parquet.
        slices: Columns of slices.parquet without those that say where a slice lies; the piece holds them in this order.
        piece_bytes: Length of the piece; 0 if there is none.
        fingerprint: Features for near duplicates, or None.
        thumbnail: PNG as base64, or "".
        histogram: Counts of HU, see `volume_job.HISTOGRAM_EDGES_HU`.
        refused: Reason for leaving slices out, to the first such slice as PNG in base64.
    """

    job: str
    row: dict[str, Any]
    slices: dict[str, list[Any]] = field(default_factory=dict)
    piece_bytes: int = 0
    fingerprint: dict[str, Any] | None = None
    thumbnail: str = ""
    histogram: list[int] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class WorkFolder:
    """`<corpus>/.work`: pieces of shards and records by volume."""

    def __init__(self, corpus: Path) -> None:
        self.root = corpus / WORK_NAME

    def exists(self) -> bool:
        """Tell whether there is unfinished work."""
        return self.root.is_dir()

    def is_changing(self) -> bool:
        """Tell whether a finished corpus was about to be replaced by its next edition."""
        return (self.root / NEXT / READY).is_file()

    def piece(self, volume_id: str) -> Path:
        """Return where a volume's encoded slices lie, one behind the other."""
        return self.root / "volumes" / volume_id[:2] / f"{volume_id}.slices"

    def record_path(self, volume_id: str) -> Path:
        """Return where a volume's record lies; it is written after the piece."""
        return self.root / "volumes" / volume_id[:2] / f"{volume_id}.json"

    def write_record(self, record: VolumeRecord) -> None:
        """Write a record; from then on the volume is finished."""
        with atomic_write(self.record_path(record.row["volume_id"])) as stream:
            stream.write(canonical_json(vars(record)).encode())

    def read_record(self, volume_id: str) -> VolumeRecord | None:
        """Read a record, or None where there is none or a damaged one (the volume is then read again)."""
        try:
            return VolumeRecord(**json.loads(self.record_path(volume_id).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def record_of(self, volume_id: str, job: str) -> VolumeRecord | None:
        """Read a record if it is of this very job; None means that the volume has to be read."""
        record = self.read_record(volume_id)
        return record if record is not None and record.job == job else None

    def finished_record(self, volume_id: str) -> VolumeRecord:
        """Read the record of a volume that has been done.

        Raises:
            ConfigError: It is gone.
        """
        record = self.read_record(volume_id)
        if record is None:
            raise ConfigError(f"the work folder {self.root} was changed while it was in use; run the same command again")
        return record

    def has_piece(self, record: VolumeRecord) -> bool:
        """Tell whether a record's piece lies there whole; a refused volume needs none."""
        piece = self.piece(record.row["volume_id"])
        return record.piece_bytes == 0 or (piece.exists() and piece.stat().st_size == record.piece_bytes)

    def shard_note(self, name: str) -> Path:
        """Return where it is written down what a finished shard holds; its pieces are deleted after that."""
        return self.root / "shards" / f"{name}.json"

    def shard_notes(self) -> dict[str, dict[str, Any]]:
        """Return the notes of finished shards by name."""
        return {path.stem: json.loads(path.read_bytes()) for path in sorted((self.root / "shards").glob("*.json"))}

    def write_found(self, files: Mapping[str, int]) -> None:
        """Keep how many files the sources hold, by what became of them, for the report."""
        write_json(self.root / "found.json", dict(files))

    def read_found(self) -> dict[str, int]:
        """Return what `write_found` kept."""
        path = self.root / "found.json"
        found: dict[str, int] = json.loads(path.read_bytes()) if path.is_file() else {}
        return found

    def sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for leftover in self.root.rglob(f"*{PARTIAL_SUFFIX}"):
            leftover.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the whole folder."""
        shutil.rmtree(self.root)

    @contextmanager
    def locked(self, shared: bool) -> Iterator[None]:
        """Keep other builds away: parts of one build may run side by side, whole builds may not.

        Raises:
            ConfigError: Another build is at work there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another build is writing {self.root.parent}; wait for it or choose another --out"
                ) from error
            yield


def job_hash(*parts: str) -> str:
    """Return the hash of everything that decides what becomes of a volume."""
    text = "\x1f".join([str(RECORD_VERSION), *parts])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
