"""DINOv3's views of a slice: global and local crops, the Gram teacher's larger ones, and masks over the global ones."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from meddino.losses.ibot import mask_weights_of
from meddino_pretrain.data.batches import RawBatch
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.methods.dinov3.config import GLOBAL_CROPS, CropsConfig, MaskingConfig
from meddino_pretrain.methods.dinov3.masking import masks_for_crops

GLOBAL, LOCAL, GRAM = "global_crops", "local_crops", "gram_teacher_crops"
MASKS, MASK_INDICES, MASK_WEIGHTS = "masks", "mask_indices", "mask_weights"


def crop_views(config: CropsConfig) -> ViewSpec:
    """Return the views; the Gram teacher's are the global crops again, larger and undistorted."""
    views = {GLOBAL: View(GLOBAL_CROPS, config.global_scale, frozen=1)}
    if config.num_local:
        views[LOCAL] = View(config.num_local, config.local_scale)
    if config.sizes[0].gram_px is not None:
        views[GRAM] = View(GLOBAL_CROPS, boxes_of=GLOBAL, augmented=False, trained=False, frozen=1)
    sizes = []
    for each in config.sizes:
        px = {GLOBAL: each.global_px, LOCAL: each.local_px, GRAM: each.gram_px}
        sizes.append(ViewSizes({name: side for name, side in px.items() if name in views and side is not None}, each.weight))
    return ViewSpec(views, tuple(sizes), config.aspect_ratio, config.flip_probability)


def add_masks(config: MaskingConfig, patch_px: int, raw: RawBatch, order: SampleOrder) -> RawBatch:
    """Add the masks of the global crops: "masks" [2 B, N], their flattened "mask_indices" [M] and "mask_weights" [M].

    A masked patch weighs 1 / (masked patches in the same crop).
    """
    side = raw.views[GLOBAL].shape[-1] // patch_px
    masks = masks_for_crops(config, order.seed, raw.step, order.global_batch, raw.samples, (side, side), GLOBAL_CROPS)
    return replace(raw, extras=mask_extras(torch.from_numpy(masks)))


def mask_extras(masks: Bool[Tensor, "crops patches"]) -> dict[str, Tensor]:
    """Return what a batch says of its masks: themselves, the indices of the masked patches in them, and their weights."""
    return {MASKS: masks, MASK_INDICES: masks.flatten().nonzero().flatten(), MASK_WEIGHTS: mask_weights_of(masks)}
