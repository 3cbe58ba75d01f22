"""Products of float32 matrices on a CPU, and a linear layer's gradient through them."""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(
    x: Float[Tensor, "... in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """Return x weight^T + bias with `product`'s arithmetic, in the backward pass too."""
    output: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return output.view(*x.shape[:-1], weight.shape[0])


def product(
    left: Float[Tensor, "n k"], right: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None = None, *, gelu: bool = False
) -> Float[Tensor, "n m"]:
    """Return left right^T + bias, or the GELU of it, without a gradient: by oneDNN where that is there, else by torch.

    Either factor may be a transposed view.
    """
    if not _has_it(left, right):
        result = torch.mm(left, right.t()) if bias is None else torch.addmm(bias, left, right.t())
        return functional.gelu(result) if gelu else result
    after, algorithm = ("gelu", "none") if gelu else ("none", "")
    found: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, after, [], algorithm)
    return found


def _has_it(left: Tensor, right: Tensor) -> bool:
    return left.device.type == "cpu" and left.dtype == right.dtype == torch.float32 and left.numel() > 0 and _has_onednn()


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix as rows or as columns without gaps: for a part of wider ones oneDNN takes a kernel 2,000 times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def takes(*tensors: Tensor) -> bool:
    """Tell whether tensors go through this package's own autograd functions: float32 on a CPU, run eagerly.

    On accelerators, under autocast, torch.compile and tracing the plain formulas run: there a compiler or a library
    does better than we could, and tools that count or convert operations know every one of them.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) in _PLAIN for tensor in tensors)


# Subclasses such as FSDP's sharded parameters bring their own rules for every operation.
_PLAIN = (Tensor, nn.Parameter)


@functools.cache
def _has_onednn() -> bool:
    """Tell whether oneDNN's product can be called.

    torch.mm goes to MKL, which leaves out AVX-512 on processors of other makers: measured on an AMD EPYC (Zen 5), one
    thread, 2920 x 384 x 1536 in float32: 95 GFLOP/s there, 205 GFLOP/s in oneDNN, equal to the last digits. The operator
    is the one that torch.compile's own code calls; where a build lacks it, torch.mm it is.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
        found = torch.ops.mkldnn._linear_pointwise(left, right.t(), torch.ones(4), "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, left @ right + 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if wants_x else None,
            product(grad.t(), x.t()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )
