"""DINO: the student's crops predict the teacher's assignment of the image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meddino.losses.prototype_cross_entropy import prototype_cross_entropy
from meddino.losses.sinkhorn import SinkhornTargets


@dataclass(frozen=True)
class DinoTerms:
    """The two DINO terms of one step.

    Attributes:
        weighted: Sum of both terms times their weights; carries the gradient.
        global_crops: Term of the global crops, for the log; no gradient.
        local_crops: Term of the local crops, for the log; no gradient. Zero if there are none.

    A term whose weight is zero reads zero.
    """

    weighted: Float[Tensor, ""]
    global_crops: Float[Tensor, ""]
    local_crops: Float[Tensor, ""]


def dino_terms(
    global_bottleneck: Float[Tensor, "crops batch dim"],
    local_bottleneck: Float[Tensor, "local_crops batch dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    targets: SinkhornTargets,
    student_temperature: float = 0.1,
    global_weight: float = 1.0,
    local_weight: float = 1.0,
) -> DinoTerms:
    """Return the cross-entropies between student crops and the teacher's global crops of the same images, without logits.

        log_probs = log_softmax(bottleneck @ prototypes.T / student_temperature)
        for s in range(S):                                         # global_crops: another crop of the image
            for t in range(T):
                if s != t:
                    for b in range(B):
                        loss -= targets[t, b] @ log_probs[s, b] / (B * S * (T - 1))
        for s in range(L):                                         # local_crops: every teacher crop
            for t in range(T):
                for b in range(B):
                    loss -= targets[t, b] @ local_log_probs[s, b] / (B * L * T)

    Args:
        global_bottleneck: Student's head before its last layer, S = T global crops of B images.
        local_bottleneck: The same of the local crops; there may be none.
        prototypes: Weight of the student head's last layer.
        targets: The teacher's assignments of the global crops, crop-major: row = crop * B + image.
        student_temperature: Divides the student's logits, > 0.
        global_weight: Weight of the global term in `weighted`.
        local_weight: Weight of the local term in `weighted`.

    Raises:
        ValueError: If the targets are not those of the global crops, or there is only one global crop.

    Source: Caron et al. 2021; DINOv3.
    """
    crops, batch, dim = global_bottleneck.shape
    local_crops = len(local_bottleneck)
    if crops < 2 or len(targets) != crops * batch:
        raise ValueError(f"need targets for at least two global crops; {crops} crops of {batch} images, {len(targets)} targets")
    device, dtype = global_bottleneck.device, targets.dtype
    image = torch.arange(batch, device=device)
    every = torch.arange(crops, device=device)[None] * batch + image[:, None]  # [B, T]
    others = torch.stack([torch.cat([every[:, :crop], every[:, crop + 1 :]], dim=1) for crop in range(crops)])  # [S, B, T - 1]
    # A global row has one teacher crop fewer: its last place repeats a teacher row at weight zero.
    global_rows = torch.cat([others, others[..., :1]], dim=-1).flatten(0, 1)
    global_weights = torch.full(global_rows.shape, global_weight / (batch * crops * (crops - 1)), dtype=dtype, device=device)
    global_weights[:, -1] = 0.0
    local_rows = every.repeat(local_crops, 1)
    local_weights = torch.full(local_rows.shape, local_weight / max(1, batch * crops * local_crops), dtype=dtype, device=device)
    total, by_row = prototype_cross_entropy(
        torch.cat([global_bottleneck.reshape(-1, dim), local_bottleneck.reshape(-1, dim)]),
        prototypes,
        targets,
        torch.cat([global_rows, local_rows]),
        torch.cat([global_weights, local_weights]),
        student_temperature,
    )
    by_crop = torch.split(by_row, [crops * batch, local_crops * batch])
    return DinoTerms(total, _unweighted(by_crop[0], global_weight), _unweighted(by_crop[1], local_weight))


def _unweighted(rows: Float[Tensor, " rows"], weight: float) -> Float[Tensor, ""]:
    return rows.sum() / weight if weight else rows.sum()
