"""Storage for torch.distributed.checkpoint that holds safetensors and JSON only.

torch's own storage keeps its index as a pickle (`.metadata`) and reads it with `pickle.load`, so opening a stranger's
checkpoint would run the stranger's code. Here every process writes the pieces it owns to one safetensors file and the
index is JSON. What torch.distributed.checkpoint is kept for: who writes which piece of a replicated or sharded tensor,
and how pieces written by N processes are read by M.

torch's HuggingFaceStorageWriter also writes safetensors; it builds each file as one byte string in memory, writes its
header in a changing order (equal states would give unequal bytes) and leaves no checksums.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from meddino.core.errors import CheckpointError
from meddino.core.files import write_json

INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 1 << 28  # an index of a million pieces is 200 MB; more is no index

# Names of the safetensors format.
DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class SafetensorsWriter(StorageWriter):
    """Writes one `rank-00000.safetensors` a process and, last, `index.json`.

    Attributes:
        files: After saving, on the process that coordinates: file name -> {"bytes", "sha256"}.
    """

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        """Remember where to write.

        Args:
            folder: Existing folder.
            values: What is no tensor (JSON), by flat name; written into the index.
        """
        self.folder = folder
        self.values = values
        self.files: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Start anew; one writer serves one checkpoint, so there is nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Need nothing before planning."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each process the name of its file."""
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pieces this process owns, one after the other, and hash the file on the way."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Sorted, so that the bytes do not depend on the order in which a dict was filled.
        items = sorted(plan.items, key=_piece_name)
        header, sizes = _header(items)
        digest = hashlib.sha256()
        total = 0
        with (self.folder / plan.storage_data).open("wb") as stream:
            for block in _blocks(header, items, planner):
                stream.write(block)
                digest.update(block)
                total += memoryview(block).nbytes
        written = {"file": plan.storage_data, "bytes": total, "sha256": digest.hexdigest()}
        return [WriteResult(item.index, sizes[_piece_name(item)], {**written, "name": _piece_name(item)}) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; called on the coordinating process when all pieces are written."""
        tensors: dict[str, Any] = {}
        for result in sorted((result for part in results for result in part), key=lambda result: result.storage_data["name"]):
            stored = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(stored, TensorStorageMetadata)  # nothing else is ever handed over
            entry = tensors.setdefault(
                result.index.fqn,
                {"dtype": DTYPE_CODES[stored.properties.dtype], "shape": list(stored.size), "pieces": []},
            )
            offset = tuple(result.index.offset or (0,) * len(stored.size))
            sizes = next(chunk.sizes for chunk in stored.chunks if tuple(chunk.offsets) == offset)
            place = {"file": result.storage_data["file"], "name": result.storage_data["name"]}
            entry["pieces"].append({"offset": list(offset), "shape": list(sizes), **place})
            self.files[place["file"]] = {key: result.storage_data[key] for key in ("bytes", "sha256")}
        write_json(self.folder / INDEX_FILE, {"tensors": tensors, "values": self.values})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Accept any path."""
        return True


class SafetensorsReader(StorageReader):
    """Reads what `SafetensorsWriter` wrote, with any number of processes."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        self.folder = folder
        self.index = read_index(folder)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Start anew; one reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in torch.distributed.checkpoint's terms."""
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[entry["dtype"]]),
                torch.Size(entry["shape"]),
                [ChunkStorageMetadata(torch.Size(piece["offset"]), torch.Size(piece["shape"])) for piece in entry["pieces"]],
            )
            for name, entry in self.index["tensors"].items()
        }
        return Metadata(dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Need nothing: every process has read the index itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the pieces that this process asked for into its tensors."""
        pieces = {
            (name, tuple(piece["offset"])): piece for name, entry in self.index["tensors"].items() for piece in entry["pieces"]
        }
        by_file: dict[str, list[Any]] = {}
        for request in plan.items:
            key = (request.storage_index.fqn, tuple(request.storage_index.offset or ()))
            by_file.setdefault(pieces[key]["file"], []).append((request, pieces[key]["name"]))
        for file, requests in sorted(by_file.items()):
            with safe_open(self.folder / file, framework="pt") as stream:
                for request, name in requests:
                    part = tuple(
                        slice(start, start + length)
                        for start, length in zip(request.storage_offsets, request.lengths, strict=True)
                    )
                    source = stream.get_slice(name)[part] if part else stream.get_tensor(name)
                    target = planner.resolve_tensor(request).detach()
                    target.copy_(source)
                    planner.commit_tensor(request, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Accept any path."""
        return True


def read_index(folder: Path) -> dict[str, Any]:
    """Return and check the index of a checkpoint folder: {"tensors": {name: ...}, "values": {name: ...}}.

    Raises:
        CheckpointError: If it is missing, damaged, or points outside the folder.
    """
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_INDEX_BYTES >> 20} MiB and no index of a checkpoint")
        index = json.loads(path.read_bytes())
        for name, entry in index["tensors"].items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} has the unknown data type {entry['dtype']!r}")
            for piece in entry["pieces"]:
                if Path(piece["file"]).name != piece["file"]:
                    raise CheckpointError(f"{path}: tensor {name} lies in {piece['file']!r}, outside the checkpoint's folder")
        if not isinstance(index["values"], dict):
            raise TypeError("values is no mapping")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; this is no complete training checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return dict(index)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return whole tensors of a checkpoint by name, their pieces joined, without any process group.

    Args:
        folder: A checkpoint folder.
        prefix: Only names that begin so; it is cut off.

    Raises:
        CheckpointError: If the folder is damaged.
    """
    index = read_index(folder)
    result: dict[str, torch.Tensor] = {}
    try:
        for name, entry in index["tensors"].items():
            if not name.startswith(prefix):
                continue
            whole = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            for piece in entry["pieces"]:
                with safe_open(folder / piece["file"], framework="pt") as stream:
                    target = whole[
                        tuple(
                            slice(start, start + length) for start, length in zip(piece["offset"], piece["shape"], strict=True)
                        )
                    ]
                    target.copy_(stream.get_tensor(piece["name"]))
            result[name.removeprefix(prefix)] = whole
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
    return result


def _piece_name(item: WriteItem) -> str:
    offset = item.index.offset
    return f"{item.index.fqn}@{','.join(map(str, offset))}" if offset is not None and any(offset) else item.index.fqn


def _header(items: list[WriteItem]) -> tuple[bytes, dict[str, int]]:
    entries: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    end = 0
    for item in items:
        assert item.tensor_data is not None
        dtype = item.tensor_data.properties.dtype
        if dtype not in DTYPE_CODES:
            raise CheckpointError(f"tensor {item.index.fqn} has data type {dtype}, which no checkpoint can hold")
        shape = list(item.tensor_data.chunk.sizes)
        size = torch.Size(shape).numel() * dtype.itemsize
        entries[_piece_name(item)] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        sizes[_piece_name(item)] = size
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return struct.pack("<Q", len(text)) + text, sizes


def _blocks(header: bytes, items: list[WriteItem], planner: SavePlanner) -> Iterator[Any]:
    yield header
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        # One tensor at a time comes to the host, so saving needs no second copy of the state.
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""
