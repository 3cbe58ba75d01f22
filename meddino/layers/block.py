"""One block of the transformer: attention and perceptron, each with pre-norm, LayerScale and batch-subset drop path."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meddino.core.device import at_least_float32
from meddino.layers.attention import SelfAttention
from meddino.layers.packing import CropGroup, KeptTokens


class LayerScale(nn.Module):
    """One learned factor a channel (Touvron et al. 2021), which `TransformerBlock` multiplies with."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def reset_parameters(self) -> None:
        """Set every factor to the initial value."""
        nn.init.constant_(self.gamma, self.initial)


class StreamNorm(nn.LayerNorm):
    """LayerNorm in its input's data type: mean and variance are float32 inside, input and output stay as narrow as they are.

    Autocast would make the input float32, keep that copy for the backward pass, and hand on what is made bfloat16 again.
    """

    def forward(self, input: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalise the last dimension."""
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class OutputNorm(StreamNorm):
    """The LayerNorm after the last block: what leaves the network is float32 at least, as losses want it."""

    def forward(self, input: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalise the last dimension."""
        return super().forward(at_least_float32(input))


class TransformerBlock(nn.Module):
    """x + ls1 * attention(norm1 x), then x + ls2 * mlp(norm2 x).

    The tokens keep their data type from block to block, with drop path and without: bfloat16 under autocast, as in DINOv3.

    Args:
        dim: Width of the tokens.
        attention: Attention over packed crops.
        feed_forward: Perceptron over tokens.
        layerscale_init: Initial value of both LayerScales; None for no LayerScale.
        norm_eps: Epsilon of both LayerNorms.
    """

    def __init__(
        self, dim: int, attention: SelfAttention, feed_forward: nn.Module, layerscale_init: float | None, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = StreamNorm(dim, eps=norm_eps)
        self.attn = attention
        self.ls1 = LayerScale(dim, layerscale_init) if layerscale_init is not None else None
        self.norm2 = StreamNorm(dim, eps=norm_eps)
        self.mlp = feed_forward
        self.ls2 = LayerScale(dim, layerscale_init) if layerscale_init is not None else None

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        groups: Sequence[CropGroup],
        kept: tuple[KeptTokens, KeptTokens] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Transform packed tokens.

        Args:
            x: Tokens of all crops.
            groups: How they are packed.
            kept: Tokens that attention and perceptron are computed for; None computes all.
        """
        x = _add_residual(x, self.attention_branch, groups, kept[0] if kept else None)
        return _add_residual(x, self.mlp_branch, groups, kept[1] if kept else None)

    def attention_branch(self, tokens: Tensor, groups: Sequence[CropGroup]) -> Tensor:
        """Return ls1 * attention(norm1 tokens), within each crop; tokens [N of all crops, D], packed as `groups` says."""
        residual: Tensor = self.attn(self.norm1(tokens), groups)
        return residual if self.ls1 is None else residual * self.ls1.gamma.to(residual.dtype)

    def mlp_branch(self, tokens: Tensor, _groups: Sequence[CropGroup]) -> Tensor:
        """Return ls2 * mlp(norm2 tokens); tokens [N of all crops, D]."""
        residual: Tensor = self.mlp(self.norm2(tokens))
        return residual if self.ls2 is None else residual * self.ls2.gamma.to(residual.dtype)


def _add_residual(
    x: Float[Tensor, "tokens dim"],
    branch: Callable[[Tensor, Sequence[CropGroup]], Tensor],
    groups: Sequence[CropGroup],
    kept: KeptTokens | None,
) -> Float[Tensor, "tokens dim"]:
    if kept is None:
        return branch(x, groups).add_(x)  # in place: one tensor of all tokens less
    residual = branch(x.index_select(0, kept.rows), kept.groups)
    if torch.compiler.is_compiling():
        return x.index_add(0, kept.rows, (residual * kept.scales).to(x.dtype))
    added: Tensor = _AddRows.apply(x, residual, kept.rows, kept.scales)
    return added


class _AddRows(torch.autograd.Function):
    """x with scaled residuals added to some rows; autograd's own would keep the residuals, which no gradient needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
        # Inputs without a gradient, not saved tensors: a block that is recomputed ends with the last of those, before this.
        ctx.rows, ctx.scales = rows, scales
        return x.index_add(0, rows, (residual * scales).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], grads[0].index_select(0, ctx.rows) * ctx.scales, None, None
