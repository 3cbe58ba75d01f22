"""What processes tell each other. In a single process every function is the identity, so callers never ask."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

ObjectT = TypeVar("ObjectT")
_thread = threading.local()


@contextmanager
def using_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let this thread's collectives go through a process group of their own for as long as the block lasts.

    Args:
        group: Of all processes; None for the default one. Threads that talk at the same time need different groups.
    """
    before = current_group()
    _thread.group = group
    try:
        yield
    finally:
        _thread.group = before


def current_group() -> dist.ProcessGroup | None:
    """Return the process group of this thread's collectives; None for the default one."""
    group: dist.ProcessGroup | None = getattr(_thread, "group", None)
    return group


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes work together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def all_reduce_sum(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of a tensor over all processes. The argument is left as it is; no gradient flows."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the element-wise maximum of a tensor over all processes. No gradient flows."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def all_reduce_mean(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the mean of a tensor over all processes. No gradient flows."""
    return all_reduce_sum(values) / world_size()


def all_gather_with_grad(values: Float[Tensor, " n *rest"]) -> Float[Tensor, " m *rest"]:
    """Return every process's rows, rank after rank; every process gives equally many.

    The gradient of a row is the sum of what all processes' losses say about it. Averaged over processes afterwards, as
    data parallelism does, that is the gradient of the mean of the losses.
    """
    if world_size() == 1:
        return values
    gathered: Tensor = _AllGather.apply(values)
    return gathered


def all_gather_rows(values: Shaped[Tensor, " n *rest"]) -> Shaped[Tensor, " m *rest"]:
    """Return every process's rows, rank after rank, without a gradient; every process gives equally many."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous(), group=current_group())
    return torch.cat(parts)


def broadcast_object(value: ObjectT | None) -> ObjectT:
    """Return the object that the first process holds. Only for plain data of our own (it is pickled on the way)."""
    box: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=current_group())
    result: ObjectT = box[0]
    return result


def all_gather_strings(texts: list[str]) -> list[str]:
    """Return every process's texts, rank after rank."""
    if world_size() == 1:
        return texts
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, texts, group=current_group())
    return [text for part in gathered for text in part]


def any_rank(flag: bool) -> bool:
    """True if any process says so; every process must ask at the same point."""
    if world_size() == 1:
        return flag
    # A CPU tensor: the group talks gloo there even where tensors on the device talk NCCL, so the device is not waited for.
    return bool(all_reduce_max(torch.tensor([int(flag)]))[0])


def on_main(action: Callable[[], ObjectT]) -> ObjectT:
    """Do something on the first process and give its result, or its error, to all."""
    result: tuple[ObjectT | None, Exception | None] = (None, None)
    if is_main():
        try:
            result = (action(), None)
        except Exception as error:  # noqa: BLE001 - raised again on every process
            result = (None, error)
    value, problem = broadcast_object(result)
    if problem is not None:
        raise problem
    return cast("ObjectT", value)


def barrier() -> None:
    """Wait until every process has come here."""
    any_rank(False)


def _all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return values
    reduced = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=operation, group=current_group())
    return reduced


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn's own all_gather goes back through all_to_all, which gloo does not offer for lists.
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.rows = values.shape[0]
        return all_gather_rows(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return all_reduce_sum(grads[0])[start : start + ctx.rows]
