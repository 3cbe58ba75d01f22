"""How well patch tokens know the place they stand for: measured without labels."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from meddino.core.device import Machine
from meddino.models.backbone import Backbone
from meddino_pretrain.monitoring.fixed_slices import FixedSlices

CHUNK = 4  # slices in one forward pass: small enough for any machine that can train


def patch_consistency(
    first: Float[Tensor, "n d h w"], second_mirrored: Float[Tensor, "n d h w"], body: Bool[Tensor, "n y x"] | None = None
) -> Float[Tensor, " n"]:
    """Score how surely a patch is found again in another view of its slice.

    For each patch of the first view: the share of the second view's other patches that are less similar to it (cosine)
    than its own counterpart; ties count half. 1 is perfect, 0.5 is chance, and chance is what features give that
    collapsed, drown in noise, or know only where a patch lies (the second view is mirrored).

    Args:
        first: Patch map of the first view.
        second_mirrored: Patch map of the mirrored second view; turned back here.
        body: Where the first view shows the body, at any resolution. Only patches that are at least half body count, for
            air cannot be told from air; None, or a slice without two such patches: all count.

    Returns:
        One score a slice, the mean over its patches.
    """
    # Contiguous: sums over channels must not depend on how the backbone laid its tokens out.
    one = F.normalize(first.float().contiguous().flatten(2).transpose(1, 2), dim=-1)
    other = F.normalize(second_mirrored.float().flip(-1).contiguous().flatten(2).transpose(1, 2), dim=-1)
    kept = torch.ones(one.shape[:2], dtype=torch.bool, device=one.device)
    if body is not None:
        kept = F.adaptive_avg_pool2d(body.float(), (first.shape[-2], first.shape[-1])).flatten(1).to(one.device) >= 0.5
        kept[kept.sum(1) < 2] = True
    scores = []
    for a, b, chosen in zip(one, other, kept, strict=True):  # a slice at a time: patches x patches is the largest thing here
        similarity = a[chosen] @ b[chosen].T
        own = similarity.diagonal().unsqueeze(1)
        # Rounding must not decide between patches that are equal: a collapsed model would win or lose by luck.
        below = (similarity < own - 1e-6).float() + 0.5 * ((similarity - own).abs() <= 1e-6).float()
        others = len(similarity) - 1
        scores.append(((below.sum(1) - 0.5) / others).mean() if others else own.new_tensor(0.5))
    return torch.stack(scores)


@torch.no_grad()
def snapshot_scores(backbone: Backbone, fixed: FixedSlices, machine: Machine) -> Float[Tensor, " n"]:
    """Score a backbone's patch tokens on fixed slices; see `patch_consistency`.

    Args:
        backbone: In evaluation mode.
        fixed: The slices.
        machine: Where the backbone is.
    """
    scores = []
    for start in range(0, len(fixed), CHUNK):
        maps = []
        for view in (fixed.first_view, fixed.second_view):
            with machine.autocast():
                output = backbone.tokens(view[start : start + CHUNK].to(machine.device, machine.weight_dtype))
            maps.append(output.patch_map)
        scores.append(patch_consistency(maps[0], maps[1], fixed.body[start : start + CHUNK]).cpu())
    return torch.cat(scores)
