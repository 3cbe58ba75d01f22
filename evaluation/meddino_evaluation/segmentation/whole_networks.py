"""Baselines that bring their own encoder, from kept libraries, in the shape of a head that reads only the image."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import ConfigError
from meddino_evaluation.segmentation.heads import to_size


class WholeNetwork(nn.Module):
    """A network from images to logits.

    Args:
        network: Returns logits, a list of them (deep supervision, first one used) or an object with `.logits`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, maps: Sequence[Tensor], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size; the maps are not looked at."""
        del maps
        found: Any = self.network(images)
        return to_size(getattr(found, "logits", found), images)


def build_unet(channels: int, num_outputs: int, crop_px: int) -> nn.Module:
    """MONAI's DynUNet in nnU-Net's 2D shape: from 32 channels to 512, halved until the side is about 4 pixels."""
    from monai.networks.nets import DynUNet

    depth = max(2, min(8, int(math.log2(crop_px / 4)) + 1))
    filters = [min(32 * 2**level, 512) for level in range(depth)]
    network = DynUNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=num_outputs,
        kernel_size=[3] * depth,
        strides=[1] + [2] * (depth - 1),
        upsample_kernel_size=[2] * (depth - 1),
        filters=filters,
        norm_name="instance",
    )
    return WholeNetwork(network)


def build_transunet(channels: int, num_outputs: int, crop_px: int) -> nn.Module:
    """A transformer between convolutions, as TransUNet: MONAI's UNETR in 2D (ViT encoder, convolutional decoder and stem)."""
    _need("einops", "whole_transunet")
    from monai.networks.nets import UNETR

    network = UNETR(
        in_channels=channels,
        out_channels=num_outputs,
        img_size=crop_px,
        feature_size=16,
        hidden_size=384,
        mlp_dim=1536,
        num_heads=6,
        spatial_dims=2,
    )
    return WholeNetwork(network)


def build_segformer(channels: int, num_outputs: int, crop_px: int) -> nn.Module:
    """SegFormer-B0 of transformers, with random weights."""
    del crop_px  # fully convolutional
    _need("transformers", "whole_segformer")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return WholeNetwork(SegformerForSemanticSegmentation(SegformerConfig(num_channels=channels, num_labels=num_outputs)))


def _need(module: str, head: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"head.name={head} needs {module}, which is not installed: pip install 'meddino[baselines]'")
