"""Large and small crops of a slice: the views that most methods here learn from, their forward pass, and where cells lie."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meddino.core.seeds import derive_seed
from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.models.backbone import Backbone, BackboneOutput
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.methods.base import StageSetting
from meddino_pretrain.methods.config import MultiCropConfig

LARGE, SMALL = "large_crops", "small_crops"
Plans = Mapping[str, DropPathPlan]


def multi_crop_views(config: MultiCropConfig, with_boxes: bool = False, frozen: int = 0) -> ViewSpec:
    """Return the views.

    Args:
        config: Number, size and area of the crops.
        with_boxes: Whether batches carry where each was cut.
        frozen: Networks without a backward pass that see the large ones.
    """
    views, px = {LARGE: View(config.num_large, config.large_scale, frozen=frozen)}, {LARGE: config.large_px}
    if config.num_small:
        views[SMALL], px[SMALL] = View(config.num_small, config.small_scale), config.small_px
    return ViewSpec(views, (ViewSizes(px),), config.aspect_ratio, config.flip_probability, with_boxes)


def without_masks(backbone: Backbone) -> Backbone:
    """Return a backbone whose mask token is not trained: nothing depends on it, and DDP would wait for its gradient."""
    if isinstance(backbone, VisionTransformer):
        backbone.mask_token.requires_grad_(False)
    return backbone


def drop_path_plans(batch: Batch, setting: StageSetting, step: int) -> dict[str, DropPathPlan]:
    """Return what is random in the forward pass of each kind of view: a function of seed, step and samples alone."""
    samples, total = setting.share.samples(batch.micro_step), setting.share.global_batch
    return {
        name: DropPathPlan(
            derive_seed(setting.seed, "views", name),
            step,
            (CropIndices.of_samples(len(images) // len(batch.keys), samples, total),),
        )
        for name, images in batch.views.items()
    }


@dataclass(frozen=True)
class SeenCrop:
    """One view of every slice of a batch.

    Attributes:
        kind: Large or small.
        cls_token: See `BackboneOutput`.
        patch_tokens: See `BackboneOutput`.
        grid: See `BackboneOutput`.
    """

    kind: str
    cls_token: Tensor
    patch_tokens: Tensor
    grid: tuple[int, int]


def see_crops(backbone: nn.Module, batch: Batch, plans: Plans, kinds: tuple[str, ...] = (LARGE, SMALL)) -> list[SeenCrop]:
    """Return what a backbone sees of each crop, the large ones first; one forward pass a kind."""
    seen = []
    for kind in (kind for kind in kinds if kind in batch.views):
        output: BackboneOutput = backbone(batch.views[kind], plan=plans.get(kind))
        views = len(batch.views[kind]) // len(batch.keys)
        tokens = zip(output.cls_token.chunk(views), output.patch_tokens.chunk(views), strict=True)
        seen += [SeenCrop(kind, cls_token, patch_tokens, output.grid) for cls_token, patch_tokens in tokens]
    return seen


def cell_centres(boxes: Int[Tensor, "n 7"], grid: tuple[int, int]) -> Float[Tensor, "n p 2"]:
    """Return where the cells of crops' maps lie in their images, in lengths of the image's longer side, (y, x).

    Args:
        boxes: See `RawBatch.boxes`.
        grid: Rows and columns of the map.
    """
    top, left, height, width, flipped, rows, columns = boxes.double().unbind(1)
    y = (torch.arange(grid[0], device=boxes.device) + 0.5) / grid[0]
    x = ((torch.arange(grid[1], device=boxes.device) + 0.5) / grid[1]).expand(len(boxes), -1)
    x = torch.where(flipped[:, None] > 0, 1 - x, x)
    longer = torch.maximum(rows, columns)[:, None]
    down = (top[:, None] + y * height[:, None]) / longer
    right = (left[:, None] + x * width[:, None]) / longer
    centres = torch.stack([down[:, :, None].expand(-1, -1, grid[1]), right[:, None, :].expand(-1, grid[0], -1)], dim=-1)
    return centres.flatten(1, 2).float()
