"""One module over several processes: copies with averaged gradients (DDP) or cut into parts (FSDP2)."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meddino.core.machine_config import Parallel
from meddino.distributed.collectives import world_size


def choose_parallel(asked: Parallel) -> Parallel:
    """Return how modules are spread: "auto" is DDP for several processes; a single process needs nothing."""
    if world_size() == 1:
        return "none"
    return "ddp" if asked in ("auto", "none") else asked


def shard(
    root: nn.Module,
    parts: Sequence[nn.Module],
    methods: Sequence[str] = (),
    trained: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Cut a module's parameters over all processes, in place (FSDP2).

    Args:
        root: The module; its own `forward` and `methods` gather what they need.
        parts: Modules inside that are gathered one at a time, e.g. the blocks of a transformer.
        methods: Names of methods of `root` that are called like `forward`.
        trained: The root's own parameters stay gathered until the backward pass; else they are given up after forward.
        dtype: What they are gathered in, for the products: half the bytes on the way and in memory where it is bfloat16. Each
            process keeps its part, and gradients are summed, in float32 at least.
    """
    # Inputs keep their type: what is float32 among them, such as rotary tables, is so on purpose.
    policy = MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)
    for part in parts:
        fully_shard(part, mp_policy=policy)
    fully_shard(root, reshard_after_forward=not trained, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(root, method)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts: sharded ones (FSDP2) are gathered, to be kept where they are needed longer."""
    if isinstance(tensor, DTensor):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return tensor.detach()


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module so that its gradients are averaged over all processes (DDP)."""
    with warnings.catch_warnings():  # of the argument's newer name, which older versions do not know
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=None if device.type == "cpu" else [device],
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


@contextlib.contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Say whether gradients are exchanged in the backward passes of this block; off for all but the last micro-batch."""
    if isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    yield
