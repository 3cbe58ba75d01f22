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

    def rows(self, groups: Sequence[CropGroup]) -> Tensor:
        """Return the packed rows of the kept crops' tokens, [kept tokens] int64."""
        rows, offset = [], 0
        for group, index in zip(groups, self.indices, strict=True):
            within = torch.arange(group.tokens, device=index.device)
            rows.append((offset + index[:, None] * group.tokens + within).flatten())
            offset += group.batch * group.tokens
        return torch.cat(rows)

    def row_scales(self, groups: Sequence[CropGroup], like: Tensor) -> Tensor:
        """Return what the kept rows' residuals are multiplied by, [kept tokens, 1]."""
        scales = [
            like.new_full((len(index) * group.tokens, 1), scale)
            for group, index, scale in zip(groups, self.indices, self.scales, strict=True)
        ]
        return torch.cat(scales)

    def subset(self, groups: Sequence[CropGroup]) -> tuple[CropGroup, ...]:
        """Return the groups with only the kept crops."""
        return tuple(
            CropGroup(len(index), group.tokens, group.table) for group, index in zip(groups, self.indices, strict=True)
        )


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
