"""Whether a checkpoint folder is whole: format, files, sizes and checksums, all named in its meta.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.checkpoints.state.names import META_FILE, list_checkpoints
from meddino.checkpoints.state.safetensors_storage import read_index
from meddino.core.errors import CheckpointError
from meddino.core.files import canonical_json, sha256_file, write_json
from meddino.core.logging import get_logger
from meddino.distributed.collectives import on_main

FORMAT = "meddino-training-state"
VERSION = 1
MAX_META_BYTES = 1 << 26
RESERVED = ("format", "version", "files", "world_size", "meta_sha256")

_log = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete training checkpoint on disk.

    Attributes:
        folder: `.../step-000000100`.
        meta: What was given to `save_training_state`, with format, version, files and world_size beside it.
    """

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.meta["step"])


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint in a folder, or None. Every process calls this; one reads.

    Every file is compared with its checksum. A damaged one is reported as an error in the log, by name and with the
    reason, and the one before it is taken.
    """

    def find() -> Checkpoint | None:
        for path in reversed(list_checkpoints(folder)):
            try:
                return verify_checkpoint(path)
            except CheckpointError as error:
                _log.error("checkpoint %s is not usable and is passed over: %s", path, error)
        return None

    return on_main(find)


def verify_checkpoint(folder: Path, *, contents: bool = True) -> Checkpoint:
    """Check a checkpoint folder: format, files, sizes and, with `contents`, SHA-256 of every file.

    Raises:
        CheckpointError: Says what is missing or damaged.
    """
    meta = _read_meta(folder)
    for name, wanted in meta["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is damaged")
        if path.stat().st_size != wanted["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {wanted['bytes']}; it is damaged")
        if contents and sha256_file(path) != wanted["sha256"]:
            raise CheckpointError(f"{path} does not have the checksum that {META_FILE} names; it is damaged")
    listed = {piece["file"] for entry in read_index(folder)["tensors"].values() for piece in entry["pieces"]}
    if not listed <= set(meta["files"]):
        raise CheckpointError(f"{folder}: {sorted(listed - set(meta['files']))} are in the index but not in {META_FILE}")
    return Checkpoint(folder, meta)


def write_meta(folder: Path, meta: Mapping[str, Any], files: Mapping[str, Any], world_size: int) -> None:
    """Write meta.json, which makes a folder a checkpoint: what is given, and size and SHA-256 of every other file."""
    content = {**meta, "format": FORMAT, "version": VERSION, "files": files, "world_size": world_size}
    # Through JSON once, so that the checksum is of what a reader gets (tuples become lists, 1e5 stays 100000.0).
    content = json.loads(canonical_json(content))
    write_json(folder / META_FILE, {**content, "meta_sha256": _sha256(content)})


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no complete training checkpoint: it has no {META_FILE}")
    if path.stat().st_size > MAX_META_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_META_BYTES >> 20} MiB and no checkpoint's {META_FILE}")
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{path}: format is {meta['format']!r}, not {FORMAT!r}; this is no training checkpoint")
        if meta["version"] != VERSION:
            raise CheckpointError(f"{path}: version {meta['version']} is not readable; this program reads {VERSION}")
        checksum = meta.pop("meta_sha256")
        if checksum != _sha256(meta) or not isinstance(meta["step"], int):
            raise CheckpointError(f"{path} does not agree with its own checksum; it is damaged")
        {name: (entry["bytes"], entry["sha256"]) for name, entry in meta["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return dict(meta)


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(meta).encode()).hexdigest()
