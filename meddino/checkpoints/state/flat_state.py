"""Training state as flat names: tensors on one side, JSON values on the other."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meddino.checkpoints.state.safetensors_storage import DTYPES
from meddino.core.errors import CheckpointError
from meddino.distributed.collectives import rank, world_size

# What wrappers put into names: DistributedDataParallel, torch.compile, activation checkpointing, FSDP1.
WRAPPER_PARTS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@runtime_checkable
class Stateful(Protocol):
    """An object that gives and takes its state as nested mappings."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, to be read into in place, and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values; the tensors have been read in place."""


class OptimizerState:
    """An optimizer's moments by parameter name, so that they fit whatever the order of parameter groups or processes.

    Learning rates and the like are not stored: they are functions of the step and are set anew by the schedule.
    torch's own `get_optimizer_state_dict` takes a step when there is no state yet, which changes the step count of a
    checkpoint written before the first step; this one stores nothing then.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        """Pair an optimizer with the module whose parameters it updates.

        Args:
            name: The name that it is saved under.
            optimizer: Any whose per-parameter state is tensors (AdamW, SGD, ...).
            module: Holds the parameters, wrapped (DDP, compiled, FSDP2) or not.
        """
        self.name = name
        self.optimizer = optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.parameters = {plain_name(key): value for key, value in module.named_parameters() if id(value) in held}
        if len(self.parameters) != len(held):
            raise ValueError(f"optimizer '{name}': {len(held) - len(self.parameters)} parameters are not in the module")

    def state_dict(self) -> dict[str, Any]:
        """Return {parameter name: {"exp_avg": tensor, ...}}."""
        return {
            name: dict(self.optimizer.state[parameter])
            for name, parameter in self.parameters.items()
            if self.optimizer.state.get(parameter)
        }

    def prepare_to_load(self, index: Mapping[str, Any]) -> None:
        """Make empty moments of exactly the names and shapes that the checkpoint holds."""
        self.optimizer.state.clear()
        for full_name, entry in index["tensors"].items():
            parameter_name, _, key = full_name.removeprefix(f"{self.name}.").rpartition(".")
            if not full_name.startswith(f"{self.name}.") or parameter_name not in self.parameters:
                continue
            parameter = self.parameters[parameter_name]
            dtype = DTYPES[entry["dtype"]]
            if tuple(entry["shape"]) == tuple(parameter.shape) and parameter.ndim:
                made = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)  # sharded where the parameter is
            else:
                # AdamW's step count stays on the host unless it is fused or capturable.
                on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
                made = torch.zeros(entry["shape"], dtype=dtype, device=parameter.device if on_device else "cpu")
            self.optimizer.state[parameter][key] = made

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Need nothing: the moments were read in place."""


def plain_name(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and activation checkpointing put into it."""
    for part in WRAPPER_PARTS:
        name = name.removeprefix(part).replace(f".{part}", ".")
    return name


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (not copied) and the JSON values of a state by flat, dotted names.

    Raises:
        CheckpointError: If a leaf is neither, or two leaves get the same name.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, nn.Module):
            item = {plain_name(key): value for key, value in item.state_dict().items()}
        elif isinstance(item, torch.optim.Optimizer):
            raise CheckpointError(f"'{name}' is an optimizer, whose own names are numbers; give it as an OptimizerState")
        elif not isinstance(item, Mapping) and isinstance(item, Stateful):
            item = item.state_dict()
        if isinstance(item, Mapping):
            for key, value in item.items():
                visit(f"{name}.{key}" if name else str(key), value)
            return
        if name in tensors or name in values:
            raise CheckpointError(f"two parts of the state are called '{name}'")
        if isinstance(item, Tensor):
            tensors[name] = item.detach()
        elif item is None or isinstance(item, bool | int | float | str | list):
            values[name] = item
        else:
            raise CheckpointError(f"'{name}' is a {type(item).__name__}; a checkpoint holds tensors and JSON values")

    visit("", state)
    return tensors, values


def written_here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this process writes of a state: its parts of what is sharded, and its share of what all hold alike (DDP).

    The shares are about equally large, and each process knows all of them without a message.
    """
    shares = [0] * world_size()
    mine: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = shares.index(min(shares))
        if isinstance(tensor, DTensor):
            owner = rank()
        else:
            shares[owner] += tensor.numel() * tensor.dtype.itemsize
        if owner == rank():
            mine[name] = tensor
    return mine


def assign(state: Mapping[str, Any], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Give loaded JSON values back to the mappings and objects of a state; its tensors were read in place."""

    def collect(name: str, item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: collect(f"{name}.{key}", value) for key, value in item.items()}
        return tensors[name] if isinstance(item, Tensor) else values[name]

    def visit(name: str, item: Any) -> None:
        if isinstance(item, nn.Module | Tensor):
            return
        if not isinstance(item, Mapping):
            item.load_state_dict(collect(name, item.state_dict()))
            return
        for key, value in item.items():
            full = f"{name}.{key}" if name else str(key)
            if full in values:
                cast("MutableMapping[str, Any]", item)[key] = values[full]
            else:
                visit(full, value)

    visit("", state)
