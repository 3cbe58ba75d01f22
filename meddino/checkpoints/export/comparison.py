"""Whether two models compute the same."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from meddino.checkpoints.export.model import Model
from meddino.core.errors import CheckpointError
from meddino.models.registry import tapped_blocks

# Another library adds in another order; the same code does not. Relative to the largest output where that is above 1.
TOLERANCE_OTHER_LIBRARY = 2e-5


def all_tokens(model: Model, images: Tensor) -> Tensor:
    """Return CLS, register and patch tokens as one [B, tokens, D], the order of all libraries."""
    with torch.no_grad():
        features = model.forward_features(images)
        return torch.cat([features.cls_token[:, None], features.register_tokens, features.patch_tokens], dim=1)


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest absolute difference over pairs of tensors; NaN anywhere gives infinity.

    Raises:
        CheckpointError: If shapes differ.
    """
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise CheckpointError(f"outputs of different shapes: {list(one.shape)} and {list(other.shape)}")
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        largest = max(largest, float("inf") if math.isnan(difference) else difference)
    return largest


def outputs(model: Model, stored: Tensor) -> list[Tensor]:
    """Return what exports are compared on: CLS, registers, patch tokens, and the maps of four blocks."""
    images = model.preprocess(stored)
    with torch.no_grad():
        features = model.forward_features(images)
        taps = tapped_blocks(model.depth, min(4, model.depth))
        maps = model.backbone.get_intermediate_layers(images, taps)
        return [features.cls_token, features.register_tokens, features.patch_tokens, *maps]


def check_other_library(expected: Sequence[Tensor], found: Sequence[Tensor], library: str, what: str) -> None:
    """Refuse outputs of another library that differ from ours by more than rounding.

    Raises:
        CheckpointError: If they do.
    """
    difference = largest_difference(expected, found)
    scale = max([1.0, *(tensor.abs().max().item() for tensor in expected if tensor.numel())])
    if not difference <= TOLERANCE_OTHER_LIBRARY * scale:
        raise CheckpointError(
            f"loaded by {library}, the export does not compute what its source does: {what} differ by {difference:.2e} "
            f"(allowed: {TOLERANCE_OTHER_LIBRARY * scale:.0e}); nothing was written"
        )
