"""Dice + cross-entropy, for classes and for regions that overlap, with ignored pixels left out of both."""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino_evaluation.data.labels import IGNORED, LabelScheme

SMOOTH = 1e-5


def segmentation_loss(
    logits: Float[Tensor, "batch outputs rows cols"],
    values: NDArray[np.int32],
    labels: LabelScheme,
    dice_weight: float,
    ce_weight: float,
) -> Float[Tensor, ""]:
    """Return Dice + cross-entropy against label values [B, H, W], by classes or by regions as the labels are."""
    device = logits.device
    if not labels.has_regions:
        return class_loss(logits, torch.from_numpy(labels.class_indices(values)).to(device), dice_weight, ce_weight)
    masks = np.stack([labels.mask(values, target) for target in range(len(labels.names))], axis=1)
    counted = torch.from_numpy(values != IGNORED).unsqueeze(1).to(device, torch.float32)
    return region_loss(logits, torch.from_numpy(masks).to(device, torch.float32), counted, dice_weight, ce_weight)


def soft_dice_loss(
    probabilities: Float[Tensor, "batch outputs *space"],
    targets: Float[Tensor, "batch outputs *space"],
    counted: Float[Tensor, "batch 1 *space"],
) -> Float[Tensor, ""]:
    """One minus the mean soft Dice over outputs, each computed over the whole batch.

    Args:
        probabilities: In [0, 1].
        targets: 0 or 1.
        counted: 0 where a pixel is ignored, else 1.

    Source: nnU-Net's batch Dice for 2D plans (smooth 1e-5, denominator clipped at 1e-8).
    """
    axes = (0, *range(2, probabilities.ndim))
    overlap = (probabilities * targets * counted).sum(axes)
    total = ((probabilities + targets) * counted).sum(axes)
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)
    return 1 - dice.mean()


def class_loss(
    logits: Float[Tensor, "batch outputs *space"],
    labels: Int[Tensor, " batch *space"],
    dice_weight: float,
    ce_weight: float,
) -> Float[Tensor, ""]:
    """Dice over the foreground classes + softmax cross-entropy over all.

    Args:
        logits: Background first.
        labels: Channel numbers, `IGNORED` where not counted.
        dice_weight: Weight of the Dice loss.
        ce_weight: Weight of the cross-entropy (mean over counted pixels).
    """
    counted = (labels != IGNORED).to(torch.float32)
    known = labels.clamp_min(0).long().unsqueeze(1)
    # One log-softmax serves both terms, and gathering it at the labels makes one-hot targets unnecessary.
    log_probabilities = logits.float().log_softmax(1)
    own = log_probabilities.gather(1, known).squeeze(1)
    loss = log_probabilities.new_zeros(())
    if dice_weight:
        loss = loss + dice_weight * _dice_from_logs(log_probabilities, own, known.squeeze(1), counted)
    if ce_weight:
        loss = loss - ce_weight * (own * counted).sum() / counted.sum().clamp_min(1)  # all ignored: 0, not 0 / 0
    return loss


def _dice_from_logs(log_probabilities: Tensor, own: Tensor, known: Tensor, counted: Tensor) -> Tensor:
    """`soft_dice_loss` over the foreground classes, from log-probabilities [B, K, ...] and their values at the labels."""
    classes = log_probabilities.shape[1]
    zeros = log_probabilities.new_zeros(classes)
    overlap = zeros.index_add(0, known.flatten(), (own.exp() * counted).flatten())
    pixels = zeros.index_add(0, known.flatten(), counted.flatten())
    predicted = (log_probabilities.exp() * counted.unsqueeze(1)).sum((0, *range(2, log_probabilities.ndim)))
    dice = (2 * overlap + SMOOTH) / (predicted + pixels + SMOOTH).clamp_min(1e-8)
    return 1 - dice[1:].mean()


def region_loss(
    logits: Float[Tensor, "batch outputs *space"],
    targets: Float[Tensor, "batch outputs *space"],
    counted: Float[Tensor, "batch 1 *space"],
    dice_weight: float,
    ce_weight: float,
) -> Float[Tensor, ""]:
    """Dice + binary cross-entropy over regions, which may overlap.

    Args:
        logits: One a region.
        targets: 0 or 1.
        counted: 0 where a pixel is ignored, else 1.
        dice_weight: Weight of the Dice loss.
        ce_weight: Weight of the cross-entropy (mean over counted pixels and regions).
    """
    loss = logits.new_zeros(())
    if dice_weight:
        loss = loss + dice_weight * soft_dice_loss(logits.float().sigmoid(), targets, counted)
    if ce_weight:
        pixels = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * counted
        loss = loss + ce_weight * pixels.sum() / (counted.sum() * logits.shape[1]).clamp_min(1)
    return torch.as_tensor(loss)
