"""How well patch tokens know the place they stand for: measured without labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meddino.core.device import Machine
from meddino.models.vision_transformer import ViTOutput
from meddino_pretrain.fixed_slices import FixedSlices

CHUNK = 4  # slices in one forward pass: small enough for any machine that can train


def patch_consistency(first: Float[Tensor, "n d h w"], second_mirrored: Float[Tensor, "n d h w"]) -> Float[Tensor, " n"]:
    """Score how surely a patch is found again in another view of its slice.

    For each patch of the first view: the share of the second view's other patches that are less similar to it (cosine)
    than its own counterpart; ties count half. 1 is perfect, 0.5 is chance, and chance is what features give that
    collapsed, drown in noise, or know only where a patch lies (the second view is mirrored).

    Args:
        first: Patch map of the first view.
        second_mirrored: Patch map of the mirrored second view; turned back here.

    Returns:
        One score a slice, the mean over its patches.
    """
    one = F.normalize(first.float().flatten(2).transpose(1, 2), dim=-1)
    other = F.normalize(second_mirrored.float().flip(-1).flatten(2).transpose(1, 2), dim=-1)
    scores = []
    for a, b in zip(one, other, strict=True):  # a slice at a time: patches x patches is the largest thing here
        similarity = a @ b.T
        own = similarity.diagonal().unsqueeze(1)
        # Rounding must not decide between patches that are equal: a collapsed model would win or lose by luck.
        below = (similarity < own - 1e-6).float() + 0.5 * ((similarity - own).abs() <= 1e-6).float()
        others = max(1, len(a) - 1)
        scores.append(((below.sum(1) - 0.5) / others).mean() if len(a) > 1 else own.new_tensor(0.5))
    return torch.stack(scores)


def patch_map(output: ViTOutput) -> Float[Tensor, "n d h w"]:
    """Return patch tokens as a map, float32."""
    tokens = output.patch_tokens.float()
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[-1], *output.grid)


@torch.no_grad()
def snapshot_scores(see: Callable[[Tensor], ViTOutput], fixed: FixedSlices, machine: Machine) -> Float[Tensor, " n"]:
    """Score a backbone's patch tokens on fixed slices; see `patch_consistency`.

    Args:
        see: A backbone in evaluation mode, or what calls one.
        fixed: The slices.
        machine: Where the backbone is.
    """
    scores = []
    for start in range(0, len(fixed), CHUNK):
        views = []
        for view in (fixed.first_view, fixed.second_view):
            with machine.autocast():
                output = see(view[start : start + CHUNK].to(machine.device))
            views.append(patch_map(output))
        scores.append(patch_consistency(*views).cpu())
    return torch.cat(scores)
