"""Masked autoencoding as a method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.layers.drop_path import DropPathPlan
from meddino.models.backbone import Backbone
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.methods.base import Method, StageSetting, count_flops, on_meta
from meddino_pretrain.methods.masked_image.config import MaskedImageConfig
from meddino_pretrain.methods.masked_image.network import CROPS, MASKED, VISIBLE, MaskedImageNetwork
from meddino_pretrain.methods.multi_crop import drop_path_plans, without_masks
from meddino_pretrain.schedules import StepValues


class MaskedImage(Method):
    """See `Method`."""

    model: MaskedImageNetwork

    def __init__(self, model: MaskedImageNetwork, config: MaskedImageConfig, setting: StageSetting) -> None:
        """Take a finished network."""
        self.model, self.called = model, model
        self.config, self.setting, self.machine = config, setting, setting.machine

    @classmethod
    def views(cls, config: MaskedImageConfig) -> ViewSpec:
        """See `Method`."""
        sizes = (ViewSizes({CROPS: config.crop_px}),)
        return ViewSpec({CROPS: View(1, config.area)}, sizes, config.aspect_ratio, config.flip_probability)

    @classmethod
    def collate(cls, config: MaskedImageConfig, patch_px: int, raw: RawBatch, order: SampleOrder) -> RawBatch:
        """See `Method`: which patches of each sample are seen, in ascending order, and which are not."""
        patches = (config.crop_px // patch_px) ** 2
        kept = visible_patches(patches, config.mask_ratio)
        drawn = np.stack(
            [numpy_rng(order.seed, "mae", number).permutation(patches) for number in order.numbers(raw.step, raw.samples)]
        )
        parts = {VISIBLE: np.sort(drawn[:, :kept]), MASKED: np.sort(drawn[:, kept:])}
        return replace(raw, extras={name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()})

    @classmethod
    def build(cls, config: MaskedImageConfig, backbone: Backbone, setting: StageSetting) -> "MaskedImage":
        """See `Method`."""
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError(
                "method masked_image leaves patches away, which only the vision transformers of the registry can "
                f"(vitb16, vits16, ...), not a {type(backbone).__name__}"
            )
        if backbone.config.drop_path > 0:
            raise ConfigError(
                f"method masked_image with drop_path {backbone.config.drop_path}: samples have places of their own; set it to 0"
            )
        patches = (config.crop_px // backbone.patch_size) ** 2
        if not 0 < visible_patches(patches, config.mask_ratio) < patches:
            raise ConfigError(
                f"method.mask_ratio {config.mask_ratio} of {patches} patches ({config.crop_px} px, patches of "
                f"{backbone.patch_size}) leaves none to see, or none to paint"
            )
        network = MaskedImageNetwork(without_masks(backbone), config)  # type: ignore[arg-type]
        return cls(network, config, setting)

    def networks(self) -> Mapping[str, nn.Module]:
        """See `Method`."""
        return {"model": self.model}

    def export(self) -> Backbone:
        """See `Method`."""
        return self.model.backbone

    def targets(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[DropPathPlan]:
        """See `Method`: what is random in the rotary embedding."""
        return (drop_path_plans(batch, self.setting, step)[CROPS] for batch in batches)

    def flops(self, batch: Batch) -> float:
        """See `Method`: the backbone on the visible patches, and the decoder."""
        images = on_meta(batch)[CROPS]
        patches = (images.shape[-1] // self.model.backbone.patch_size) ** 2
        kept = visible_patches(patches, self.config.mask_ratio)
        visible = torch.zeros(len(images), kept, dtype=torch.int64, device="meta")
        return 3 * count_flops(partial(self.model.painted, images, visible, None))


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many patches are seen."""
    return int(patches * (1 - mask_ratio))
