"""Rotary position embedding on two axes, with the coordinate augmentations of DINOv3."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from meddino.core.errors import ConfigError


@dataclass(frozen=True)
class RotaryTable:
    """Sines and cosines for one grid of patches, with rows for the tokens before them that are not rotated.

    Attributes:
        sin: [tokens, head_dim], or [batch, tokens, head_dim] where crops keep different patches; zero for CLS and registers.
        cos: Likewise; one for CLS and registers.
    """

    sin: Tensor
    cos: Tensor

    def of_patches(self, patches: Int[Tensor, "batch kept"], prefix: int) -> "RotaryTable":
        """Return the rows of the first `prefix` tokens and of some patches of each crop."""
        first = torch.arange(prefix, device=patches.device).expand(len(patches), -1)
        rows = torch.cat([first, patches + prefix], dim=1)
        return RotaryTable(self.sin[rows], self.cos[rows])


class RotaryEmbedding(nn.Module):
    """Angles 2 pi coordinate / period for patch centres in [-1, 1].

    Args:
        head_dim: Width of one attention head; a multiple of 4.
        base: Longest period over shortest.
        normalise: "separate" stretches each axis to [-1, 1]; "max" and "min" keep the aspect ratio by the longer or
            the shorter side.
        shift: Largest shift of all coordinates, each axis by itself; None for none. In units of the normalised axis.
        jitter: Each axis is scaled by a log-uniform factor in [1 / jitter, jitter]; None for none.
        rescale: Both axes are scaled by one log-uniform factor in [1 / rescale, rescale]; None for none.
        dtype: Data type of the periods and of the arithmetic, also of the rotation itself.

    Source: Heo et al. 2024; DINOv3 section 3.2. Difference from DINOv3: the augmentations are drawn once a forward
    and crop group, from a generator that is passed in, not once a block from global state.
    """

    periods: Tensor

    def __init__(
        self,
        head_dim: int,
        base: float = 100.0,
        normalise: str = "separate",
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ConfigError(
                f"rotary embedding needs a head width (embed_dim / num_heads) that is a multiple of 4, not {head_dim}"
            )
        self.head_dim, self.base, self.normalise = head_dim, base, normalise
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=dtype))
        self.reset_periods()

    def reset_periods(self) -> None:
        """Fill the periods: base ** (2 i / (head_dim / 2)) for i < head_dim / 4."""
        steps = torch.arange(self.head_dim // 4, dtype=self.periods.dtype, device=self.periods.device)
        with torch.no_grad():
            self.periods.copy_(self.base ** (2 * steps / (self.head_dim // 2)))

    @property
    def augments(self) -> bool:
        """True where a forward in training draws random numbers."""
        return any(value is not None for value in (self.shift, self.jitter, self.rescale))

    def forward(self, height: int, width: int, prefix: int, rng: torch.Generator | None = None) -> RotaryTable:
        """Return the table for a grid of patches.

        Args:
            height: Rows of patches.
            width: Columns of patches.
            prefix: Number of tokens before the patches (CLS and registers), which are not rotated.
            rng: Generator on the CPU for the augmentations; None leaves the coordinates as they are.
        """
        dtype, device = self.periods.dtype, self.periods.device
        divisors = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}
        per_row, per_column = divisors[self.normalise]
        rows = torch.arange(0.5, height, dtype=dtype, device=device) / per_row
        columns = torch.arange(0.5, width, dtype=dtype, device=device) / per_column
        coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1) * 2.0 - 1.0
        if rng is not None and self.augments:
            coordinates = self._augmented(coordinates, rng)
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods[None, None, :]  # [patches, 2, head_dim / 4]
        angles = angles.flatten(1, 2).tile(2)
        sin, cos = torch.sin(angles), torch.cos(angles)
        return RotaryTable(
            torch.cat([sin.new_zeros(prefix, self.head_dim), sin]), torch.cat([cos.new_ones(prefix, self.head_dim), cos])
        )

    def _augmented(self, coordinates: Float[Tensor, "patches 2"], rng: torch.Generator) -> Float[Tensor, "patches 2"]:
        # Always five numbers, so that switching one augmentation on does not change what the others draw.
        draws = (torch.rand(5, generator=rng) * 2 - 1).tolist()
        if self.shift is not None:
            coordinates = coordinates + coordinates.new_tensor([draw * self.shift for draw in draws[:2]])
        if self.jitter is not None:
            coordinates = coordinates * coordinates.new_tensor([self.jitter**draw for draw in draws[2:4]])
        if self.rescale is not None:
            coordinates = coordinates * self.rescale ** draws[4]
        return coordinates


def rotate(x: Float[Tensor, "*batch tokens heads dim"], table: RotaryTable) -> Float[Tensor, "*batch tokens heads dim"]:
    """Turn every pair (i, i + dim / 2) of each token's features by its angle; computed in the table's data type."""
    sin, cos = table.sin[..., None, :], table.cos[..., None, :]
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        turned: Tensor = _Rotation.apply(x, sin, cos)
        return turned
    turned = x.to(sin.dtype)
    first, second = turned.chunk(2, dim=-1)
    return (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The rotation in two passes of each half of the features, forward and back; the formula takes eight of all of them.

    A compiler makes one pass of the formula, and float32 on a CPU has layers of its own: this is for what runs eagerly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        ctx.save_for_backward(sin, cos)
        return _turned(x, sin, cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sin, cos = ctx.saved_tensors
        return _turned(grads[0], -sin, cos), None, None


def _turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    sin, cos = sin[..., :half], cos[..., :half]  # the second half repeats the first
    first, second = x[..., :half], x[..., half:]
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Products in the table's type; only their sum is rounded to the features' own.
    torch.addcmul(first * cos, second, sin, value=-1, out=result[..., :half])
    torch.addcmul(second * cos, first, sin, out=result[..., half:])
    return result
