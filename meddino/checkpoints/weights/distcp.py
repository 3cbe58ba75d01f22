"""Folders of torch.distributed.checkpoint, as DINOv3's trainer writes them: the network's tensors, and no code run."""

import enum
import io
import pickle
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from meddino.core.errors import CheckpointError

_METADATA = ".metadata"
_MAX_METADATA_BYTES = 256 << 20
_HARMLESS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size"),
    ("torch", "device"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
# What a trainer keeps beside the networks.
_NO_NETWORK = ("optimizer.", "optim.", "scheduler.", "iteration", "rng")


class _Unpickler(pickle.Unpickler):
    """Knows the classes that torch's own metadata is made of and nothing else."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_metadata = module == dcp_metadata.__name__ and isinstance(getattr(dcp_metadata, name, None), type)
        if not (is_type or is_metadata or (module, name) in _HARMLESS):
            raise CheckpointError(f"its {_METADATA} would call {module}.{name} when opened; refused, nothing in it was run")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Any:
    """Return a member of one of the metadata's enumerations; Python 3.11.0 to 3.11.3 pickle members as getattr's call."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise CheckpointError(f"its {_METADATA} would call builtins.getattr when opened; refused, nothing in it was run")
    return kind[name]


class _Reader(FileSystemReader):
    """Reads the metadata without running what it may hold; torch itself reads the tensors, weights only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, _METADATA).open("rb") as stream:
            metadata = _unpickled(stream)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_distcp_folder(folder: Path) -> bool:
    """Tell whether a folder is one of torch.distributed.checkpoint."""
    return (folder / _METADATA).is_file() and any(folder.glob("*.distcp"))


def read_distcp_folder(folder: Path, section: str) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of the networks of a trainer's checkpoint.

    Args:
        folder: Of `.metadata` and `.distcp` files.
        section: Which network, where it holds several ("teacher", "student"): the others are not read.

    Returns:
        Tensors by the file's own names, and notes on what was done.

    Raises:
        CheckpointError: It is damaged, holds no tensors, or would run code.
    """
    reader = _Reader(folder)
    try:
        found = reader.read_metadata().state_dict_metadata
        sizes = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        names = [name for name in sizes if not name.startswith(_NO_NETWORK)]
        names = [name for name in names if f"{section}." in name] or names
        wanted = sum(sizes[name].size.numel() * sizes[name].properties.dtype.itemsize for name in names)
        held = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        if not names or wanted > held:
            raise CheckpointError(f"it promises {len(names)} tensors of {wanted} bytes in files of {held}")
        tensors = {name: torch.empty(sizes[name].size, dtype=sizes[name].properties.dtype) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone is what is meant
            dcp.state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (dcp.api.CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError,
            AttributeError, TypeError, IndexError) as error:  # fmt: skip
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{folder} is truncated or damaged: {line}; copy it again") from error
    return tensors, [f"{len(names)} tensors of torch.distributed.checkpoint"]


def _unpickled(stream: IO[bytes]) -> Metadata:
    data = stream.read(_MAX_METADATA_BYTES + 1)
    if len(data) > _MAX_METADATA_BYTES:
        raise CheckpointError(f"its {_METADATA} is too large to be one")
    found = _Unpickler(io.BytesIO(data)).load()
    if not isinstance(found, Metadata):
        raise CheckpointError(f"its {_METADATA} holds {type(found).__name__}")
    return found
