"""A training step on shapes alone, as a GPU would run it: kernels, bytes, memory, waits and copies, by any build of torch.

Tensors on the meta device stand for the GPU's, real ones for the host's: what touches both is a copy, what reads a number
from the meta device is a wait, and mixing the two in one operation is an error. Autocast does not know the meta device, so
`Autocast` casts as torch's does on CUDA (its lists of operations, torch/csrc/autocast_mode.h); attention is the flash kernel.

Bytes are what a kernel must read and write: broadcast dimensions count once, gathered rows as far as they are gathered, what is
overwritten is not read; caches are ignored, so it is an upper estimate. "Compiled": the least that point-wise and reduction
kernels inside compiled parts would move if every stretch of them between two products were one kernel: inputs from outside
once, and results still held at its end; what eager autograd keeps is kept. Peaks lack fragmentation and communication buffers.
"""

import collections
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = f"{Path(__file__).parents[2]}/"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "dot", "convolution", "convolution_backward"}
GATHERS = {"index", "index_select", "gather", "embedding"}
UNREAD = {
    "copy_",
    "fill_",
    "zero_",
    "uniform_",
    "normal_",
    "_foreach_copy_",
    "_foreach_zero_",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "new_zeros",
    "new_ones",
    "new_full",
}
FREE = {
    "detach",
    "alias",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "record_stream",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "set_",
    "resize_",
    "as_strided",
    "t",
    "transpose",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "unbind",
    "diagonal",
}
# What autocast does on CUDA to the operations that occur here.
TO_HALF = {
    torch.nn.functional.linear,
    torch.conv2d,
    torch.nn.functional.conv2d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.mv,
    torch.einsum,
    torch.nn.functional.scaled_dot_product_attention,
}
TO_FLOAT = {torch.layer_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.sum, Tensor.sum, Tensor.exp}
TO_FLOAT |= {Tensor.log, Tensor.norm, torch.norm, torch.linalg.vector_norm, Tensor.pow, torch.pow}


def tensors_in(tree: object) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def span(tensor: Tensor) -> int:
    """Return the bytes that a tensor's elements lie in; broadcast dimensions count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


class Autocast(TorchFunctionMode):
    """Casts to bfloat16 as `torch.autocast("cuda")` would; weights' copies are kept until the outermost block ends."""

    depth: list[tuple[bool, bool]] = []  # of nested blocks: whether each casts, and whether it keeps weights' copies
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth and self.depth[-1][0]:
            dtype = torch.bfloat16 if func in TO_HALF else torch.float32 if func in TO_FLOAT else None
            if dtype is not None:
                args, kwargs = tree_map(lambda each: self.cast(each, dtype), (args, kwargs))
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **kwargs)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype or value.dtype not in (torch.float32, torch.bfloat16):
            return value
        if not (value.is_leaf and value.requires_grad and dtype == torch.bfloat16):
            return value.to(dtype)
        if not self.depth[-1][1]:
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = (value, value.to(dtype))
        return self.kept[id(value)][1]


@contextlib.contextmanager
def autocast(
    device_type: str, dtype: torch.dtype = torch.bfloat16, enabled: bool = True, cache_enabled: bool = True
) -> Iterator[None]:
    """Stand for `torch.autocast`."""
    Autocast.depth.append((enabled, cache_enabled and (not Autocast.depth or Autocast.depth[-1][1])))
    try:
        yield
    finally:
        Autocast.depth.pop()
        if not Autocast.depth:
            Autocast.kept.clear()


class Ledger(TorchDispatchMode):
    """Counts operations, bytes, live memory, waits and copies, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.inside, self.kernel = "other", 0, None
        self.live, self.sizes, self.numbers, self.number = 0, {}, {}, 0
        self.start()

    def start(self) -> None:
        """Count from zero; what is alive stays."""
        for name in ("kernels", "bytes", "compiled", "waits", "copies", "lines", "dtypes"):
            setattr(self, name, collections.Counter())
        self.inputs, self.made, self.stretch = {}, {}, None
        self.peaks, self.gone = {"start": (self.live, self.number)}, []

    @property
    def compiling(self) -> bool:
        if self.inside:
            return True
        node = torch._C._current_autograd_node()
        return node is not None and "compiled" in node.metadata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        leaves = tensors_in((args, kwargs))
        on_device = [each for each in leaves if each.device.type == "meta"]
        if name == "_local_scalar_dense" and on_device:
            self.waits[self.where()] += 1
            return 1.0 if leaves[0].is_floating_point() else 1
        if name in ("nonzero", "masked_select", "equal", "is_nonzero") and on_device:
            raise AssertionError(f"{name} at {self.where()}: its result's size is only known on the device")
        to_host = name == "_to_copy" and on_device and torch.device(kwargs.get("device") or "meta").type == "cpu"
        if to_host or (name == "copy_" and {each.device.type for each in args[:2]} == {"cpu", "meta"}):
            return self._crossing(func, name, args, kwargs)
        self._check_one_device(name, leaves)
        out = func(*args, **kwargs)
        outs = tensors_in(out)
        for each in outs:
            self.hold(each)
        if not any(each.device.type == "meta" for each in outs + leaves):
            return out
        if name == "_to_copy" and not on_device:
            self.copies[("to device", bool(kwargs.get("non_blocking")), self.where())] += 1
            return out
        self.count(func, name, args, kwargs, leaves, outs)
        return out

    def count(self, func: Any, name: str, args: Any, kwargs: Any, leaves: list[Tensor], outs: list[Tensor]) -> None:
        free = func.is_view or name in FREE
        product = name in PRODUCTS or "attention" in name or name.startswith(("_foreach", "_fused")) or "c10d" in func.namespace
        compiling = self.compiling
        if self.stretch is not None and (self.stretch != self.phase or (not free and (product or not compiling))):
            self.close()
        if free or self.kernel is not None:
            return
        reads, writes = _touched(func, name, args, kwargs, leaves, outs)
        cost = sum(reads.values()) + sum(writes.values())
        self.kernels[self.phase] += 1
        self.bytes[self.phase] += cost
        place = self.where()
        self.lines[(self.phase, place, name)] += cost
        for each in outs:
            if each.is_floating_point():
                self.dtypes[(place.partition(":")[0], name, each.dtype)] += 1
        if product or not compiling:
            self.compiled[self.phase] += cost
            return
        self.stretch = self.phase
        for key, part in reads.items():
            if self.numbers.get(key[0]) not in self.made:
                self.inputs[key] = max(part, self.inputs.get(key, 0))
        for key, part in writes.items():
            self.made.setdefault(self.numbers.get(key[0]), {})[key] = part

    def close(self) -> None:
        """End a stretch of operations that one kernel would do."""
        held = set(self.numbers.values())
        written = sum(sum(parts.values()) for number, parts in self.made.items() if number in held)
        self.compiled[self.stretch] += sum(self.inputs.values()) + written
        self.inputs, self.made, self.stretch = {}, {}, None

    def hold(self, tensor: Tensor) -> None:
        """Note the memory of a new storage."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.number += 1
        self.numbers[key] = self.number
        self.sizes[key] = (storage.nbytes(), f"{self.phase} | {self.where() if storage.nbytes() > 2**23 else 'small'}")
        self.live += storage.nbytes()
        weakref.finalize(storage, self.drop, key)
        if self.live > self.peaks.get(self.phase, (0, 0))[0]:
            self.peaks[self.phase] = self.live, self.number

    def drop(self, key: int) -> None:
        size, label = self.sizes.pop(key, (0, ""))
        self.live -= size
        self.gone.append((self.numbers.pop(key, 0), self.number, size, label))

    @property
    def peak_at(self) -> str:
        """The phase in which most was held."""
        return max(self.peaks, key=lambda phase: self.peaks[phase][0])

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return self.peaks[self.peak_at][0]

    def alive(self, phase: str) -> collections.Counter[str]:
        """Return the bytes that were held at a phase's peak, by phase and line that made them."""
        peak = self.peaks[phase][1]
        held = [(self.numbers[key], *each) for key, each in self.sizes.items()]
        held += [(born, size, label) for born, died, size, label in self.gone if died >= peak]
        found = collections.Counter[str]()
        for born, size, label in held:
            found[label] += size if born <= peak else 0
        return found

    def where(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(ROOT) and not file.startswith((f"{ROOT}tests/gpu", f"{ROOT}.venv")):
                return f"{file[len(ROOT) :]}:{frame.f_lineno}"
            frame = frame.f_back
        return "torch"

    def _crossing(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Copy between host and device."""
        if name == "_to_copy":
            self.copies[("to host", bool(kwargs.get("non_blocking")), self.where())] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        way = "to host" if args[0].device.type == "cpu" else "to device"
        self.copies[(way, bool(len(args) > 2 and args[2]), self.where())] += 1
        return args[0]

    def _check_one_device(self, name: str, leaves: list[Tensor]) -> None:
        kinds = {each.device.type for each in leaves if each.ndim > 0 or each.device.type == "meta"}
        if len(kinds) > 1:
            raise AssertionError(f"{name} at {self.where()} mixes tensors of host and device")


def _touched(func: Any, name: str, args: Any, kwargs: Any, leaves: list[Tensor], outs: list[Tensor]) -> tuple[dict, dict]:
    """Return the bytes read and written by (storage, place in it, shape)."""

    def key(each: Tensor) -> tuple[int, int, tuple[int, ...]]:
        return each.untyped_storage()._cdata, each.storage_offset(), tuple(each.shape)

    written: list[Tensor] = []
    unread: set[int] = set()
    for number, argument in enumerate(func._schema.arguments):
        found = tensors_in(kwargs.get(argument.name, args[number] if number < len(args) else None))
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads":
            written += found
        if argument.is_out or (number == 0 and name in UNREAD):
            unread |= {id(each) for each in found}
    reads = {key(each): span(each) for each in leaves if id(each) not in unread and each.device.type == "meta"}
    writes = {key(each): span(each) for each in written or outs if each.device.type == "meta"}
    if name in GATHERS:
        reads[key(leaves[0])] = min(span(leaves[0]), span(outs[0]))
    return reads, writes


def in_phase(ledger: Ledger, owner: Any, attribute: str, phase: str) -> None:
    """Count what a function does as of a phase."""
    inner = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before, ledger.phase = ledger.phase, phase
        try:
            return inner(*args, **kwargs)
        finally:
            ledger.phase = before

    setattr(owner, attribute, wrapped)


def as_compiled(ledger: Ledger, function: Callable[..., Any]) -> Callable[..., Any]:
    """Count what a function does, and its backward pass, as compiled."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = {each.grad_fn for each in tensors_in((args, kwargs)) if each.grad_fn is not None}
        ledger.inside += 1
        try:
            out = function(*args, **kwargs)
        finally:
            ledger.inside -= 1
        waiting = [each.grad_fn for each in tensors_in(out) if each.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node in before or "compiled" in node.metadata:
                continue
            node.metadata["compiled"] = True
            waiting += [each for each, _ in node.next_functions if each is not None and "AccumulateGrad" not in each.name()]
        return out

    return wrapped


@contextlib.contextmanager
def meta_device(ledger: Ledger) -> Iterator[None]:
    """Let torch take the meta device for a GPU for as long as the block lasts."""
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    supported = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
    places: list[tuple[Any, str, Any]] = [
        (torch, "autocast", autocast),
        (torch, "is_autocast_enabled", lambda *_: bool(Autocast.depth and Autocast.depth[-1][0])),
        (torch, "get_autocast_dtype", lambda *_: torch.bfloat16),
        (torch.utils.checkpoint, "_get_autocast_kwargs", lambda *_args, **_kwargs: (None, {"enabled": False})),
    ]
    lists = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    places += [(module, name, lambda: supported) for module in (optimizer, _foreach_utils) for name in lists]
    draws = ("trunc_normal_", "normal_", "uniform_", "zeros_", "ones_", "constant_")
    places += [(nn.init, name, lambda tensor, *_args, **_kwargs: tensor) for name in draws]
    run_backward = torch.autograd._engine_run_backward

    def casting_backward(*args: Any, **kwargs: Any) -> Any:
        with Autocast():  # torch lays modes down for what it hands to one; blocks are recomputed in here
            return run_backward(*args, **kwargs)

    places.append((torch.autograd, "_engine_run_backward", casting_backward))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    assert clip_grad._has_foreach_support.__module__ == "torch.utils._foreach_utils"
    for owner, name, stand_in in places:
        setattr(owner, name, stand_in)
    try:
        with Autocast(), torch.autograd.set_multithreading_enabled(False), ledger:
            yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)
