"""The light heads: from the encoder's patch tokens to one logit map a class."""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PrimusStage(nn.Module):
    """Twice the resolution, half the channels: transposed convolution (kernel 2, stride 2), LayerNorm over channels, GELU.

    Args:
        in_channels: Channels of what comes in.
        out_channels: Channels of what goes out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Float[Tensor, "batch rows cols channels"]) -> Float[Tensor, "batch rows2 cols2 channels2"]:
        """Run on channels-last maps.

        Kernel and stride are equal, so each input pixel makes its own four outputs: one matrix product, and the norm and
        the activation, which act on each pixel alone, run before the pixels are put in place.
        """
        batch, rows, cols, _ = x.shape
        out = self.up.out_channels
        weight = self.up.weight.permute(2, 3, 1, 0).reshape(4 * out, -1)  # [2 * 2 * out, in]
        bias = None if self.up.bias is None else self.up.bias.repeat(4)
        four = F.gelu(self.norm(F.linear(x, weight, bias).view(batch, rows, cols, 2, 2, out)))
        return four.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * cols, out)


class PrimusHead(nn.Module):
    """The paper's decoder: as many stages as halve the stride of the tokens to one pixel, then a 1x1 convolution.

    Args:
        shapes: (channels, stride) of each map.
        num_outputs: Logit maps.

    Source: MedDINOv3 (arXiv 2509.02379), after Primus (arXiv 2503.01835). At 4 x 768 channels, patch 16 and 16 classes
    25.1 M parameters. At a patch size that is no power of 2 the last map is resized to the image.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], num_outputs: int) -> None:
        super().__init__()
        total = sum(channels for channels, _ in shapes)
        steps = round(math.log2(common_stride(shapes)))
        widths = [max(8, total // 2**stage) if stage else total for stage in range(steps + 1)]
        self.stride = common_stride(shapes)
        self.stages = nn.ModuleList(PrimusStage(wide, narrow) for wide, narrow in itertools.pairwise(widths))
        self.classify = nn.Conv2d(widths[-1], num_outputs, kernel_size=1)

    def forward(
        self, maps: Sequence[Tensor], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size."""
        x = concatenated(maps, images, self.stride).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        weight = self.classify.weight.flatten(1)
        logits = F.linear(x, weight, self.classify.bias).permute(0, 3, 1, 2)
        return to_size(logits, images)


class LinearHead(nn.Module):
    """A 1x1 convolution on the patch tokens, its logits resized to the image (bilinear).

    Args:
        shapes: (channels, stride) of each map.
        num_outputs: Logit maps.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], num_outputs: int) -> None:
        super().__init__()
        self.stride = common_stride(shapes)
        self.classify = nn.Conv2d(sum(channels for channels, _ in shapes), num_outputs, kernel_size=1)

    def forward(
        self, maps: Sequence[Tensor], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size."""
        return to_size(self.classify(concatenated(maps, images, self.stride)), images)


def common_stride(shapes: Sequence[tuple[int, int]]) -> int:
    """Return the stride at which maps are concatenated: that of a vision transformer's; at most 16 of a pyramid's."""
    return max((stride for _, stride in shapes if stride <= 16), default=min(stride for _, stride in shapes))


def concatenated(maps: Sequence[Tensor], images: Tensor, stride: int) -> Tensor:
    """Return the maps side by side, those of a pyramid resized to one grid (bilinear)."""
    size = (images.shape[-2] // stride, images.shape[-1] // stride)
    same = [
        one if one.shape[-2:] == size else F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps
    ]
    return torch.cat(same, dim=1)


def he_initialise(module: nn.Module) -> None:
    """He-normal weights and zero biases for convolutions (slope 0.01, as nnU-Net does)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, a=1e-2)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def to_size(logits: Tensor, images: Tensor) -> Tensor:
    """Resize logit maps to the size of the images (bilinear), if they differ."""
    if logits.shape[-2:] == images.shape[-2:]:
        return logits
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
