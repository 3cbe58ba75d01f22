"""Crops of several sizes as one row of tokens: linear layers then run once over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meddino.layers.rotary_embedding import RotaryTable


@dataclass(frozen=True)
class CropGroup:
    """Crops of one size inside a packed row.

    Attributes:
        batch: Number of crops.
        tokens: Tokens of each: CLS, registers, patches.
        table: Rotary table of the crops' grid.
    """

    batch: int
    tokens: int
    table: RotaryTable


@dataclass(frozen=True)
class KeptSamples:
    """The samples whose residual one branch of one block computes.

    Attributes:
        indices: For each group, the positions of its kept crops, [kept] int64.
        scales: For each group, number of crops over number of kept ones, in the whole batch over all processes.
    """

    indices: tuple[Tensor, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class KeptTokens:
    """`KeptSamples` as one branch of one block needs it, ready before the first block runs.

    Attributes:
        rows: The packed rows of the kept crops' tokens, [kept tokens] int64.
        scales: What their residuals are multiplied by, [kept tokens, 1].
        groups: The groups with only the kept crops.
    """

    rows: Tensor
    scales: Tensor
    groups: tuple[CropGroup, ...]

    def by_group(self, groups: Sequence[CropGroup]) -> "list[KeptTokens]":
        """Return what is kept of each group, whose tokens then stand alone.

        Args:
            groups: How all tokens are packed.
        """
        found, start, offset = [], 0, 0
        for own, group in zip(self.groups, groups, strict=True):
            stop = start + own.batch * own.tokens
            found.append(KeptTokens(self.rows[start:stop] - offset, self.scales[start:stop], (own,)))
            start, offset = stop, offset + group.batch * group.tokens
        return found


def kept_tokens(kept: Sequence[KeptSamples], groups: Sequence[CropGroup], like: Tensor) -> list[KeptTokens]:
    """Return the rows of every branch, computed for all of them at once.

    Args:
        kept: Of every branch of every block.
        groups: How tokens are packed.
        like: Packed tokens.
    """
    by_group, offset = [], 0
    for number, group in enumerate(groups):
        counts = [len(samples.indices[number]) for samples in kept]
        index = torch.cat([samples.indices[number] for samples in kept])
        rows = offset + index[:, None] * group.tokens + torch.arange(group.tokens, device=index.device)
        by_group.append(torch.split(rows.flatten(), [count * group.tokens for count in counts]))
        offset += group.batch * group.tokens
    scales: dict[tuple[int, ...], Tensor] = {}  # most branches keep equally many

    def tokens(samples: KeptSamples, parts: tuple[Tensor, ...]) -> KeptTokens:
        sizes = tuple(len(part) for part in parts)
        if sizes not in scales:
            filled = [like.new_full((size, 1), scale) for size, scale in zip(sizes, samples.scales, strict=True)]
            scales[sizes] = torch.cat(filled)
        own = [CropGroup(len(index), group.tokens, group.table) for group, index in zip(groups, samples.indices, strict=True)]
        # Memory of its own even of a single group: a compiled block would take each view's offset for a new kind of input.
        return KeptTokens(torch.cat(parts), scales[sizes], tuple(own))

    return [tokens(samples, parts) for samples, parts in zip(kept, zip(*by_group, strict=True), strict=True)]


def split_groups(packed: Tensor, groups: Sequence[CropGroup]) -> list[Tensor]:
    """Return views [batch, tokens, ...] of a packed [total tokens, ...]."""
    sizes = [group.batch * group.tokens for group in groups]
    # One split: its backward is a single concatenation, where slices would each add into a full-size zero tensor.
    parts = torch.split(packed, sizes) if len(sizes) > 1 else [packed]
    return [part.view(group.batch, group.tokens, *part.shape[1:]) for part, group in zip(parts, groups, strict=True)]


def join_groups(parts: Sequence[Tensor]) -> Tensor:
    """Return [batch, tokens, ...] tensors as one packed [total tokens, ...]; the inverse of `split_groups`."""
    flat = [part.flatten(0, 1) for part in parts]
    return torch.cat(flat) if len(flat) > 1 else flat[0]
