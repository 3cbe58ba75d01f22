"""Files of weights from strangers: recognised by content, read without running anything in them, refused by name."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from meddino.checkpoints.state.flat_state import WRAPPER_PARTS
from meddino.checkpoints.weights.distcp import is_distcp_folder, read_distcp_folder
from meddino.core.errors import CheckpointError

# Under which keys trainers keep what is wanted; of DINO-like files the teacher is what one evaluates.
SECTIONS = (
    "teacher", "state_dict", "model_state_dict", "model", "student", "module", "network_weights",
    "classy_state_dict", "base_model", "trunk",
)  # fmt: skip
MAX_SAFETENSORS_HEADER = 100_000_000
# Names under which Lightning modules, and VISSL's trunk, keep a network.
_LIGHTNING_PARTS = ("model.", "encoder.", "network.", "net.", "_feature_blocks.")
SHARD_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file or of a sharded folder.

    Attributes:
        tensors: By the file's own names, without wrapper prefixes.
        notes: What was done on the way, for the report: sections opened, prefixes taken off.
    """

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def read_weights_file(path: Path, section: str | None = None) -> WeightsFile:
    """Read a safetensors file or a torch file of tensors.

    Args:
        path: The file; its name's ending says nothing, its content does.
        section: Of a torch file with several state dicts ("teacher", "student"): which one; None takes the first of
            `SECTIONS` that is there.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no weights at all (an HTML page, a git-lfs pointer), or
            a pickle that would run code; says which and what to do.
    """
    kind = _recognise(path)
    if kind == "safetensors":
        return _without_wrappers(_read_safetensors(path), [])
    return _from_mapping(_read_torch(path, kind), path, section)


def read_sharded_folder(folder: Path, section: str | None = None) -> WeightsFile:
    """Read a folder as transformers writes it (one weights file, or shards with an index) or torch.distributed.checkpoint.

    Args:
        folder: Of the files.
        section: Which network of a trainer's checkpoint; None takes the teacher.

    Raises:
        CheckpointError: No weights are there, or a shard is missing or damaged.
    """
    for name in SHARD_INDEXES:
        index = folder / name
        if not index.is_file():
            continue
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); copy the folder again") from error
        tensors: dict[str, Tensor] = {}
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r}, outside its folder")
            tensors |= read_weights_file(folder / file).tensors
        return WeightsFile(tensors, [f"joined {len(files)} shards"])
    if is_distcp_folder(folder):
        return _without_wrappers(*read_distcp_folder(folder, section or "teacher"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights_file(folder / name)
    raise CheckpointError(f"{folder} holds no model.safetensors, no pytorch_model.bin and no index of shards")


def _recognise(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"no weights file at {path}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(512)
    text = head.lstrip().lower()
    if not size:
        raise CheckpointError(f"{path} is empty; the download or copy broke off: get it again")
    if text.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"size (\d+)", head)
        raise CheckpointError(
            f"{path} is a git-lfs pointer ({size} bytes), not the weights{f' ({int(wanted[1]):,} bytes)' if wanted else ''}; "
            "run `git lfs pull` in its repository, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise CheckpointError(
            f"{path} is an HTML or XML page saved under a weights file's name (a login or error page); open the address in a "
            "browser, accept the licence there, and download again"
        )
    if len(head) > 8 and head[8:9] == b"{":
        _check_safetensors_size(path, head, size)
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path, size)
        return "zip"
    if head.startswith(b"\x80") and head[1] <= pickle.HIGHEST_PROTOCOL:
        return "pickle"
    if text.startswith((b"{", b"[")):
        raise CheckpointError(f"{path} is JSON, not weights; give the weights file beside it, or its folder")
    raise CheckpointError(
        f"{path} is no readable weights file, neither safetensors nor a torch file (it begins with {head[:8]!r}); unpack it "
        "if it is an archive, or download it again"
    )


def _check_safetensors_size(path: Path, head: bytes, size: int) -> None:
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_SAFETENSORS_HEADER:
        raise CheckpointError(f"{path}: its safetensors header claims {length} bytes; the file is damaged")
    if length + 8 > size:
        raise CheckpointError(f"{path} is truncated: header of {length} bytes, file of {size}; copy or download it again")
    with path.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: its safetensors header is damaged ({error}); get the file again") from error
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        raise CheckpointError(f"{path} is truncated: {size:,} of {needed:,} bytes; copy or download it again")


def _check_zip(path: Path, size: int) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated: a torch file without its end; copy or download it again")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not any(Path(entry.filename).name == "data.pkl" for entry in entries):
        raise CheckpointError(f"{path} is a zip archive but no torch file; unpack it and give the weights file inside")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:  # torch stores without compression, so a larger sum is a bomb or damage
        raise CheckpointError(f"{path} claims to unpack to {unpacked:,} bytes from {size:,}; torch files never do: refused")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error


def _read_torch(path: Path, kind: str) -> Any:
    try:
        with path.open("rb") as stream:  # opened here: by its name alone torch would take it for another format
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|global|function|class)\s+`?([\w]+(?:\.[\w]+)+)", str(error))
        if name is None:
            raise CheckpointError(f"{path} is damaged: {_first_line(error)}; copy or download it again") from error
        raise CheckpointError(
            f"{path} is a pickle that would call {name[1]} when opened; refused, nothing in it was run. If you trust whoever "
            "made it, save its tensors alone as safetensors where it was made; otherwise delete it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = "truncated or damaged" if kind == "zip" else "truncated, damaged, or a pickle of something else"
        raise CheckpointError(f"{path} is {what}: {_first_line(error)}; copy or download it again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _from_mapping(loaded: Any, path: Path, section: str | None) -> WeightsFile:
    notes: list[str] = []
    if isinstance(loaded, Mapping):
        wanted = [section] if section else SECTIONS
        while key := next((key for key in wanted if isinstance(loaded.get(key), Mapping)), None):
            loaded = loaded[key]
            notes.append(f"section '{key}'")
    if section and not notes and not _has_prefix(loaded, f"{section}."):
        found = [str(key) for key in loaded] if isinstance(loaded, Mapping) else []
        raise CheckpointError(f"{path} has no section '{section}'; it has: {', '.join(found[:8])}")
    tensors = (
        {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)} if isinstance(loaded, Mapping) else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no state dict of tensors but {type(loaded).__name__}; give a file of weights")
    if others := len(loaded) - len(tensors):
        notes.append(f"{others} entries that are no tensors left out")
    for name, tensor in tensors.items():
        # A view can claim any size over few stored numbers; copying it would take that memory.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name} claims {list(tensor.shape)} over fewer stored numbers; refused")
    return _without_wrappers(tensors, notes)


def _has_prefix(loaded: Any, prefix: str) -> bool:
    return isinstance(loaded, Mapping) and any(str(key).startswith(prefix) for key in loaded)


def _without_wrappers(tensors: dict[str, Tensor], notes: list[str]) -> WeightsFile:
    """Take off what DDP, torch.compile, FSDP and Lightning put in front of names, if every name has it."""
    parts = (*WRAPPER_PARTS, *_LIGHTNING_PARTS)
    while prefix := next((part for part in parts if all(name.startswith(part) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        notes.append(f"prefix '{prefix}' taken off {len(tensors)} names")
    inner = {name for name in tensors if any(f".{part}" in name for part in WRAPPER_PARTS[1:])}
    for part in WRAPPER_PARTS[1:] if inner else ():
        tensors = {name.replace(f".{part}", "."): value for name, value in tensors.items()}
    if inner:
        notes.append(f"wrapper names taken out of {len(inner)} names")
    return WeightsFile(tensors, notes)
