"""Heads by name, and the network of a seed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.adaptation.config import FinetuneConfig
from meddino_evaluation.adaptation.trainable import adapt
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.segmentation.config import EncoderConfig, HeadName
from meddino_evaluation.segmentation.networks.heads import LinearHead, PrimusHead, he_initialise
from meddino_evaluation.segmentation.networks.network import EncoderSource, SegmentationNetwork, map_shapes
from meddino_evaluation.segmentation.networks.unet_heads import UNetHead
from meddino_evaluation.segmentation.networks.whole_networks import build_segformer, build_transunet, build_unet


@dataclass(frozen=True)
class HeadRequest:
    """What a head is built for.

    Attributes:
        shapes: (channels, stride) of each tapped map.
        channels: Channels of the model input.
        crop_px: Side of a crop.
        num_outputs: Logit maps.
    """

    shapes: Sequence[tuple[int, int]]
    channels: int
    crop_px: int
    num_outputs: int


HEADS: dict[HeadName, Callable[[HeadRequest], nn.Module]] = {
    "primus": lambda ask: PrimusHead(ask.shapes, ask.num_outputs),
    "linear": lambda ask: LinearHead(ask.shapes, ask.num_outputs),
    "unet": lambda ask: UNetHead(ask.shapes, ask.num_outputs),
    "dino_unet": lambda ask: UNetHead(ask.shapes, ask.num_outputs, image_channels=ask.channels),
    "whole_unet": lambda ask: build_unet(ask.channels, ask.num_outputs, ask.crop_px),
    "whole_transunet": lambda ask: build_transunet(ask.channels, ask.num_outputs, ask.crop_px),
    "whole_segformer": lambda ask: build_segformer(ask.channels, ask.num_outputs, ask.crop_px),
}


def build_head(name: HeadName, request: HeadRequest, seed: int) -> nn.Module:
    """Build a head with weights of its own seed, whatever the global generator has been used for.

    Raises:
        ConfigError: The head reads tokens and the model has none.
    """
    if not request.shapes and not name.startswith("whole_"):
        raise ConfigError(f"head.name={name} reads a model's tokens, and --model none has none; see head.name=whole_...")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        head = HEADS[name](request)
        if name not in ("whole_segformer", "whole_transunet"):  # they keep the initialisation of their libraries
            he_initialise(head)
    return head


def build_network(
    source: EncoderSource, config: EncoderConfig, head: HeadName, request: HeadRequest, seed: int
) -> SegmentationNetwork:
    """Build the network of a seed. A learning encoder is a copy of its own; a frozen one is shared."""
    backbone = source.backbone
    if config.mode != "frozen":
        backbone = copy.deepcopy(backbone)
        settings = FinetuneConfig(
            partial_stages=config.partial_blocks,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
        )
        adapt(backbone, config.mode, settings, derive_seed(seed, "lora"))
        if config.mode == "finetune" and isinstance(vit := backbone.network, VisionTransformer):
            vit.config = vit.config.model_copy(update={"drop_path": config.drop_path})
    return SegmentationNetwork(backbone, config.taps, build_head(head, request, seed), source.contract, config.mode)


def head_request(backbone: Backbone, config: EncoderConfig, channels: int, crop_px: int, num_outputs: int) -> HeadRequest:
    """Ask a backbone for its maps and say what a head must fit."""
    return HeadRequest(map_shapes(backbone, config.taps, channels, crop_px), channels, crop_px, num_outputs)
