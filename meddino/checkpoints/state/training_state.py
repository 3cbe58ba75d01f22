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
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from meddino.checkpoints.state.flat_state import OptimizerState, Stateful, assign, flatten
from meddino.checkpoints.state.names import remove_leftovers
from meddino.checkpoints.state.safetensors_storage import DTYPES, SafetensorsReader, SafetensorsWriter
from meddino.checkpoints.state.verify import RESERVED, verify_checkpoint, write_meta
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_directory, check_free_space, is_disk_full, sha256_file
from meddino.distributed.collectives import all_reduce_sum, broadcast_object, current_group, is_main, on_main, world_size

State = Mapping[str, nn.Module | Stateful | Mapping[str, Any] | Tensor]


def save_training_state(folder: Path, state: State, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint folder; it appears under its name when it is complete. Every process calls this.

    Args:
        folder: `<run>/<stage>/checkpoints/step-000000100`, on a disk that all processes see; see `checkpoint_name`.
        state: Name -> module, `OptimizerState`, another object with `state_dict()` / `load_state_dict()`, or a nested
            mapping or tensor. Replicated (DDP) and sharded (FSDP2, DTensor) tensors are both right; of replicated ones
            it is enough that one process gives each (`written_here`). Leaves that are no tensors must be JSON.
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
    size = _size(tensors.values())
    on_main(lambda: _prepare(folder, size))
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


def _write(partial: Path, tensors: dict[str, Tensor], values: dict[str, Any], meta: Mapping[str, Any]) -> None:
    writer = SafetensorsWriter(partial, values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1, process_group=current_group())
    if is_main():
        index = partial / "index.json"
        files = {**writer.files, index.name: {"bytes": index.stat().st_size, "sha256": sha256_file(index)}}
        write_meta(partial, meta, files, world_size())


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


def _size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that all processes together write, or more where all hold the same ones."""
    own = sum((of.to_local() if isinstance(of, DTensor) else of).numel() * of.dtype.itemsize for of in tensors)
    return int(all_reduce_sum(torch.tensor(own)))


def _prepare(folder: Path, size: int) -> None:
    remove_leftovers(folder.parent)
    check_free_space(folder.parent, size + (16 << 20), f"checkpoint {folder.name}")


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
