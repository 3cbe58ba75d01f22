"""Training checkpoints for resuming: whole or absent, checked by content, the same for one process or many.

A checkpoint is a folder `step-000000100/`:

    rank-00000.safetensors ...   the tensors, one file a process that wrote
    index.json                   which piece of which tensor lies where; values that are no tensors
    meta.json                    step, stage, config ... and size and SHA-256 of every other file

It is written beside, fsynced and renamed, meta.json last: a folder without a valid meta.json is no checkpoint. Nothing
in it is a pickle. What was saved by N processes loads in M.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from meddino.checkpoints.state.flat_state import OptimizerState, Stateful, assign, flatten
from meddino.checkpoints.state.safetensors_storage import DTYPES, SafetensorsReader, SafetensorsWriter, read_index
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_directory, canonical_json, check_free_space, is_disk_full, sha256_file, write_json
from meddino.core.logging import get_logger
from meddino.distributed.collectives import broadcast_object, current_group, is_main, world_size

META_FILE = "meta.json"
FORMAT = "meddino-training-state"
VERSION = 1
MAX_META_BYTES = 1 << 26
RESERVED = ("format", "version", "files", "world_size", "meta_sha256")

_NAME = re.compile(r"step-(\d{9,})")
_LEFTOVER = re.compile(r"step-\d{9,}\.\d+\.(partial|old)")
_log = get_logger(__name__)
_T = TypeVar("_T")

State = Mapping[str, nn.Module | Stateful | Mapping[str, Any] | Tensor]


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


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step: `step-000000100`."""
    return f"step-{step:09d}"


def save_training_state(folder: Path, state: State, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint folder; it appears under its name when it is complete. Every process calls this.

    Args:
        folder: `<run>/<stage>/checkpoints/step-000000100`, on a disk that all processes see; see `checkpoint_name`.
        state: Name -> module, `OptimizerState`, another object with `state_dict()` / `load_state_dict()`, or a nested
            mapping or tensor. Replicated (DDP) and sharded (FSDP2, DTensor) tensors are both right. Leaves that are no
            tensors must be JSON.
        meta: JSON: "step" and whatever the reader needs (stage, backbone, input_contract, lineage, corpus_hash, ...).

    Returns:
        `folder`.

    Raises:
        MedDINOError: If there is not enough room; nothing was written then.
        OSError: ENOSPC, on all processes, when the disk fills up meanwhile; nothing half-written stays.
        CheckpointError: If a leaf can not be stored.
    """
    clash = sorted(set(meta) & set(RESERVED))
    if clash or not isinstance(meta.get("step"), int):
        raise ValueError(f"meta needs an integer 'step' and must not set {RESERVED}; set: {clash}")
    tensors, values = flatten(state)
    on_main(lambda: _prepare(folder, tensors.values()))
    partial = atomic_directory(folder) if is_main() else contextlib.nullcontext(None)
    outcome: BaseException | None = None
    try:
        with partial as own:
            _write(Path(broadcast_object(str(own))), tensors, values, meta)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - told to the other processes, then raised again
        outcome = error
    # The rename happens on one process after the others are done, and only it can fail in it.
    failed = broadcast_object(None if outcome is None else f"{type(outcome).__name__}: {outcome}")
    if outcome is not None:
        raise _understandable(outcome, folder) from outcome
    if failed is not None:
        raise CheckpointError(f"the first process could not write {folder}: {failed}")
    return folder


def load_training_state(folder: Path, state: State, *, verify: bool = True) -> dict[str, Any]:
    """Load a checkpoint into modules, optimizers and mappings, in place. Every process calls this.

    Args:
        folder: A checkpoint folder.
        state: As for saving. Each name must be in the checkpoint completely and with the same shapes and data types;
            a name may go deeper ("teacher.backbone") and names of the checkpoint that are not asked for are left
            alone, so a stage can take the weights of another without its optimizer.
        verify: Compare every file with its checksum first (`latest_checkpoint` has done it already).

    Returns:
        The checkpoint's meta.

    Raises:
        CheckpointError: If the folder is damaged, or holds something else than `state` asks for.
    """
    meta = on_main(lambda: verify_checkpoint(folder, contents=verify)).meta
    reader = SafetensorsReader(folder)
    for item in state.values():
        if isinstance(item, OptimizerState):
            item.prepare_to_load(reader.index)
    tensors, values = flatten(state)
    _check_same_names(folder, state, reader.index, tensors, values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        try:
            load(dict(tensors), storage_reader=reader, no_dist=world_size() == 1)
        except CheckpointException as error:
            raise _understandable(error, folder) from error
    assign(state, tensors, {name: reader.index["values"][name] for name in values})
    return meta


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders directly in a folder by name, oldest first; their contents are not looked at."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


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


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int = 0, keep: Iterable[Path] = ()) -> list[Path]:
    """Delete old checkpoints of a folder and what an interrupted save left behind. One process calls this.

    Args:
        folder: Holds `step-*` folders.
        keep_last: How many of the newest stay, >= 1.
        keep_every: Also keep steps that are multiples of this; 0 keeps none of them.
        keep: These stay too (for example the one that a Gram teacher comes from).

    Returns:
        The folders deleted.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint has to stay")
    wanted = {path.resolve() for path in keep}
    deleted = []
    for path in list_checkpoints(folder)[:-keep_last]:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if path.resolve() in wanted or (keep_every and int(match[1]) % keep_every == 0):
            continue
        # meta.json goes first: a deletion that is interrupted leaves no folder that looks complete.
        (path / META_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)
        deleted.append(path)
    _remove_leftovers(folder)
    return deleted


def on_main(action: Callable[[], _T]) -> _T:
    """Do something on the first process and give its result, or its error, to all."""
    result: tuple[_T | None, Exception | None] = (None, None)
    if is_main():
        try:
            result = (action(), None)
        except Exception as error:  # noqa: BLE001 - raised again on every process
            result = (None, error)
    value, problem = broadcast_object(result)
    if problem is not None:
        raise problem
    return cast("_T", value)


def _write(partial: Path, tensors: dict[str, Tensor], values: dict[str, Any], meta: Mapping[str, Any]) -> None:
    writer = SafetensorsWriter(partial, values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1, process_group=current_group())
    if is_main():
        index = partial / "index.json"
        files = {**writer.files, index.name: {"bytes": index.stat().st_size, "sha256": sha256_file(index)}}
        content = {**meta, "format": FORMAT, "version": VERSION, "files": files, "world_size": world_size()}
        # Through JSON once, so that the checksum is of what a reader gets (tuples become lists, 1e5 stays 100000.0).
        content = json.loads(canonical_json(content))
        write_json(partial / META_FILE, {**content, "meta_sha256": _sha256(content)})


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


def _check_same_names(
    folder: Path, state: State, index: Mapping[str, Any], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    stored = index["tensors"]
    prefixes = tuple(state)

    def asked(name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)

    missing = [name for name in [*tensors] if name not in stored] + [name for name in values if name not in index["values"]]
    surplus = [name for name in [*stored] if asked(name) and name not in tensors]
    surplus += [name for name in index["values"] if asked(name) and name not in values]
    different = [
        f"{name}: {stored[name]['shape']} {DTYPES[stored[name]['dtype']]} in the checkpoint, "
        f"{list(tensor.shape)} {tensor.dtype} wanted"
        for name, tensor in tensors.items()
        if name in stored and (stored[name]["shape"] != list(tensor.shape) or DTYPES[stored[name]["dtype"]] != tensor.dtype)
    ]
    problems = [
        f"{what} ({len(names)}): {'; '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("not in it", missing), ("in it but not wanted", surplus), ("different", different))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} is of another model or configuration: {' | '.join(problems)}; "
            "use the configuration that wrote it, or another output folder"
        )


def _prepare(folder: Path, tensors: Iterable[Tensor]) -> None:
    _remove_leftovers(folder.parent)
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
    check_free_space(folder.parent, size + (16 << 20), f"checkpoint {folder.name}")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            _log.info("removing %s, left by an interrupted save", path)
            shutil.rmtree(path, ignore_errors=True)


def _understandable(error: BaseException, folder: Path) -> BaseException:
    """Return the first cause inside torch.distributed.checkpoint's collection of all processes' errors."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    if full := next((cause for cause in causes if is_disk_full(cause)), None):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(getattr(full, "filename", None) or folder))
    if ours := next((cause for cause in causes if isinstance(cause, CheckpointError)), None):
        return ours
    return CheckpointError(f"checkpoint {folder}: {'; '.join(f'{type(cause).__name__}: {cause}' for cause in causes)}")


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(meta).encode()).hexdigest()
