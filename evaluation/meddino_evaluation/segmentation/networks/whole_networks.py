"""Baselines that bring their own encoder, from kept libraries, in the shape of a head that reads only the image."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meddino.core.errors import ConfigError
from meddino_evaluation.segmentation.networks.heads import to_size


class WholeNetwork(nn.Module):
    """A network from images to logits.

    Args:
        network: Returns logits, or an object with `.logits`.
        multiple_px: Sides that it takes are multiples of this; others are padded at their ends, and the logits cut.
    """

    def __init__(self, network: nn.Module, multiple_px: int = 1) -> None:
        super().__init__()
        self.network = network
        self.multiple_px = multiple_px

    def forward(
        self, maps: Sequence[Tensor], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size; the maps are not looked at."""
        del maps
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.multiple_px, 0, -height % self.multiple_px))
        found: Any = self.network(padded)
        return to_size(getattr(found, "logits", found), padded)[..., :height, :width]


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
    return WholeNetwork(network, multiple_px=2 ** (depth - 1))


class TransUNet(nn.Module):
    """ResNet-50, a vision transformer on its last map, and a decoder that goes up over the ResNet's earlier maps.

    Args:
        channels: Of the images.
        num_outputs: Logit maps.
        crop_px: Side of the images, for the position embedding.
        options: For timm, where a smaller transformer is wanted.

    Source: TransUNet (arXiv 2102.04306), R50-ViT-B/16, put together from timm's hybrid of that name and MONAI's U-Net decoder
    (which follows segmentation_models). Differences: random weights, as all baselines here; transposed convolutions instead
    of bilinear resizing, and instance instead of batch norms in the decoder.
    """

    def __init__(
        self, channels: int, num_outputs: int, crop_px: int, options: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        super().__init__()
        import timm
        from monai.networks.nets.flexible_unet import UNetDecoder

        self.side_px = -(-crop_px // 16) * 16
        self.encoder = timm.create_model(
            "vit_base_r50_s16_224", pretrained=False, num_classes=0, in_chans=channels, img_size=self.side_px, **options
        )
        width = int(self.encoder.embed_dim)
        self.decoder = UNetDecoder(
            spatial_dims=2,
            encoder_channels=(channels, 64, 256, 512, width),
            decoder_channels=(256, 128, 64, 16),
            act="relu",
            norm="instance",
            dropout=0.0,
            bias=False,
            upsample="deconv",
            pre_conv=None,
            interp_mode="nearest",
            align_corners=None,
            is_pad=False,
        )
        self.classify = nn.Conv2d(16, num_outputs, kernel_size=1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return logits of images of up to `crop_px` pixels a side."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, self.side_px - width, 0, self.side_px - height))
        resnet, skips = self.encoder.patch_embed.backbone, []
        x = resnet.stem.norm(resnet.stem.conv(padded))
        for after in (resnet.stem.pool, *resnet.stages):
            if after is not resnet.stages[0]:
                skips.append(x)  # at 1/2, 1/4 and 1/8 of the side
            x = after(x)
        tokens = self.encoder.norm(self.encoder.blocks(self._embedded(self.encoder.patch_embed.proj(x))))
        deepest = tokens[:, self.encoder.num_prefix_tokens :].transpose(1, 2).unflatten(2, x.shape[-2:])
        logits: Tensor = self.classify(self.decoder([padded, *skips, deepest], skip_connect=len(skips)))
        return logits[..., :height, :width]

    def _embedded(self, grid: Tensor) -> Tensor:
        embedded: Tensor = self.encoder.norm_pre(self.encoder._pos_embed(grid.flatten(2).transpose(1, 2)))
        return embedded


def build_transunet(channels: int, num_outputs: int, crop_px: int) -> nn.Module:
    """Build TransUNet (R50-ViT-B/16) with random weights."""
    return WholeNetwork(TransUNet(channels, num_outputs, crop_px))


def build_segformer(channels: int, num_outputs: int, crop_px: int) -> nn.Module:
    """SegFormer-B0 of transformers, with random weights."""
    del crop_px  # fully convolutional
    _need("transformers", "whole_segformer")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return WholeNetwork(SegformerForSemanticSegmentation(SegformerConfig(num_channels=channels, num_labels=num_outputs)))


def _need(module: str, head: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"head.name={head} needs {module}, which is not installed: pip install 'meddino[baselines]'")
