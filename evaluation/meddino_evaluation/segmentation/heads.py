"""Heads: from the encoder's patch tokens (and the image, where a head wants it) to one logit map a class."""

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meddino.core.seeds import derive_seed


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
    """The paper's decoder: as many stages as halve the patch size to one pixel, then a 1x1 convolution.

    Args:
        taps: Tapped blocks.
        embed_dim: Channels of each.
        patch_size: Side of a patch, pixels.
        num_outputs: Logit maps.

    Source: MedDINOv3 (arXiv 2509.02379), after Primus (arXiv 2503.01835). At 4 x 768 channels, patch 16 and 16 classes
    25.1 M parameters. At a patch size that is no power of 2 the last map is resized to the image.
    """

    def __init__(self, taps: int, embed_dim: int, patch_size: int, num_outputs: int) -> None:
        super().__init__()
        widths = [max(8, taps * embed_dim // 2**stage) for stage in range(round(math.log2(patch_size)) + 1)]
        self.stages = nn.ModuleList(PrimusStage(wide, narrow) for wide, narrow in itertools.pairwise(widths))
        self.classify = nn.Conv2d(widths[-1], num_outputs, kernel_size=1)

    def forward(
        self, tokens: Float[Tensor, "batch taps dim rows cols"], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size."""
        x = tokens.flatten(1, 2).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        weight = self.classify.weight.flatten(1)
        logits = F.linear(x, weight, self.classify.bias).permute(0, 3, 1, 2)
        return to_size(logits, images)


class LinearHead(nn.Module):
    """A 1x1 convolution on the patch tokens, its logits resized to the image (bilinear).

    Args:
        taps: Tapped blocks.
        embed_dim: Channels of each.
        patch_size: Not used; every head is built alike.
        num_outputs: Logit maps.
    """

    def __init__(self, taps: int, embed_dim: int, patch_size: int, num_outputs: int) -> None:
        super().__init__()
        del patch_size
        self.classify = nn.Conv2d(taps * embed_dim, num_outputs, kernel_size=1)

    def forward(
        self, tokens: Float[Tensor, "batch taps dim rows cols"], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size."""
        return to_size(self.classify(tokens.flatten(1, 2)), images)


HEADS: dict[str, Callable[[int, int, int, int], nn.Module]] = {"primus": PrimusHead, "linear": LinearHead}


def build_head(name: str, taps: int, embed_dim: int, patch_size: int, num_outputs: int, seed: int) -> nn.Module:
    """Build a head with weights of its own seed, whatever the global generator has been used for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        head = HEADS[name](taps, embed_dim, patch_size, num_outputs)
        he_initialise(head)
    return head


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
