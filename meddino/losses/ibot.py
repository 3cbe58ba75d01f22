"""iBOT: the student predicts the teacher's assignment of the patches that it does not see."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meddino.losses.prototype_cross_entropy import prototype_cross_entropy
from meddino.losses.sinkhorn import SinkhornTargets


def ibot_term(
    bottleneck: Float[Tensor, "m dim"],
    prototypes: Float[Tensor, "k dim"],
    targets: SinkhornTargets,
    mask_weights: Float[Tensor, " m"],
    num_images: int,
    student_temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Return the cross-entropy on masked patches, averaged within each image and then over images, without all logits.

        log_probs = log_softmax(bottleneck @ prototypes.T / student_temperature)
        for i in range(m):
            loss -= mask_weights[i] * targets[i] @ log_probs[i] / num_images

    Args:
        bottleneck: The student head's output before its last layer, for the masked patches.
        prototypes: Weight of the student head's last layer.
        targets: The teacher's assignments of the same patches.
        mask_weights: One over the number of masked patches in the patch's image; see `mask_weights_of`.
        num_images: Number of global crops, those without a mask included.
        student_temperature: Divides the student's logits, > 0.

    Source: Zhou et al. 2022; DINOv3.
    """
    rows = torch.arange(len(bottleneck), device=bottleneck.device)[:, None]
    weights = (mask_weights.to(targets.dtype) / num_images)[:, None]
    return prototype_cross_entropy(bottleneck, prototypes, targets, rows, weights, student_temperature)[0]


def mask_weights_of(masks: Bool[Tensor, "images patches"]) -> Float[Tensor, " m"]:
    """Return for every masked patch, image after image, one over the number of masked patches in its image."""
    weights = 1 / masks.sum(-1).clamp(min=1).float()
    return weights[:, None].expand_as(masks)[masks]
