"""Self-attention within each crop of a packed row. The only place that chooses an attention kernel."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.errors import ConfigError
from meddino.core.machine_config import PackedKernel
from meddino.layers.linear import KeyMaskedLinear, Linear
from meddino.layers.packing import CropGroup, join_groups, split_groups
from meddino.layers.rotary_embedding import rotate


class SelfAttention(nn.Module):
    """Multi-head attention with rotary embedding over packed crops; tokens see only their own crop.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads; divides `dim`.
        qkv_bias: Whether queries, keys and values have a bias.
        mask_k_bias: Whether the keys' bias is held at zero; needs `qkv_bias`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, mask_k_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        masked = qkv_bias and mask_k_bias
        self.packed_kernel: PackedKernel = "sdpa"
        self.qkv = KeyMaskedLinear(dim, 3 * dim) if masked else Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "tokens dim"], groups: Sequence[CropGroup]) -> Float[Tensor, "tokens dim"]:
        """Attend within each crop; both projections run once over all tokens."""
        # The head's width is named: it could not be inferred where drop path leaves no token.
        projected: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if len(groups) > 1 and self.packed_kernel == "xformers":
            attended = _attend_block_diagonal(projected, groups)
        else:
            parts = split_groups(projected, groups)
            attended = join_groups([_attend(part, group) for part, group in zip(parts, groups, strict=True)])
        output: Tensor = self.proj(attended.flatten(1))
        return output


def use_packed_kernel(model: nn.Module, kernel: PackedKernel, device: torch.device) -> None:
    """Choose what computes the attention of crops of several sizes in every `SelfAttention` of a model.

    Args:
        model: The whole network.
        kernel: "sdpa" for torch's own, group after group; "xformers" for its block-diagonal attention over all at once.
        device: Where the model lies.

    Raises:
        ConfigError: xformers is asked for where it cannot run.
    """
    if kernel == "xformers" and (device.type != "cuda" or importlib.util.find_spec("xformers") is None):
        raise ConfigError(
            f"packed_attention is xformers, which needs an NVIDIA GPU (found: {device.type}) and pip install "
            "'meddino[xformers]'; allowed: sdpa"
        )
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.packed_kernel = kernel


def _rotated(
    part: Float[Tensor, "batch tokens 3 heads dim"], group: CropGroup
) -> tuple[Float[Tensor, "batch tokens heads dim"], ...]:
    query, key, value = part.unbind(2)
    return rotate(query, group.table), rotate(key, group.table), value


def _attend(part: Float[Tensor, "batch tokens 3 heads dim"], group: CropGroup) -> Float[Tensor, "batch tokens heads dim"]:
    if group.batch == 0:
        return part[:, :, 2]  # drop path left nothing of this group; the graph stays connected for DDP
    query, key, value = (tensor.transpose(1, 2) for tensor in _rotated(part, group))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _attend_block_diagonal(
    projected: Float[Tensor, "tokens 3 heads dim"], groups: Sequence[CropGroup]
) -> Float[Tensor, "tokens heads dim"]:
    from xformers.ops import memory_efficient_attention

    if not sum(group.batch for group in groups):
        return projected[:, 2]  # drop path left nothing at all, and kernels want at least one crop
    rotated = [_rotated(part, group) for part, group in zip(split_groups(projected, groups), groups, strict=True)]
    query, key, value = (join_groups([tensors[kind] for tensors in rotated])[None] for kind in range(3))
    mask = _block_diagonal_mask(tuple((group.batch, group.tokens) for group in groups), query.device)
    attended: Tensor = memory_efficient_attention(query, key, value, attn_bias=mask)
    return attended[0]


@functools.lru_cache(maxsize=4)
def _block_diagonal_mask(counts: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """Return xformers' mask for crops (number, tokens of each); the same one serves every block, and is copied once."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([tokens for batch, tokens in counts for _ in range(batch)], device=device)
