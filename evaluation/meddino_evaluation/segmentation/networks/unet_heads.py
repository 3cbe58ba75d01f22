"""U-Net heads over tapped blocks, from MONAI's blocks: without the image (S0's) and with a convolutional stem (DINO U-Net)."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meddino_evaluation.segmentation.networks.heads import to_size

WIDEST, NARROWEST = 512, 32


class UNetHead(nn.Module):
    """Tapped maps become a pyramid, the deepest block the coarsest level, and a U-Net decoder goes up it.

    Args:
        shapes: (channels, stride) of each map, the last one the deepest.
        num_outputs: Logit maps.
        image_channels: Channels of a stem that reads the image at full resolution (DINO U-Net); 0 for none.

    Source: DINOv2ForRadiology (arXiv 2312.02366) for the U-Net head over blocks; DINO U-Net (arXiv 2508.20909) for the stem.
    Blocks are MONAI's (UNETR). Difference from DINO U-Net: its adapter is a plain convolutional stem here.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], num_outputs: int, image_channels: int = 0) -> None:
        super().__init__()
        from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        deepest = shapes[-1]
        steps = max(1, round(math.log2(deepest[1])))
        base = min(WIDEST, deepest[0])
        widths = [max(NARROWEST, base // 2**level) for level in range(steps + 1)]
        options: dict[str, Any] = {"spatial_dims": 2, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.project = nn.Conv2d(deepest[0], widths[0], kernel_size=1)
        self.skips, self.ups = nn.ModuleList(), nn.ModuleList()
        self.num_skips = min(len(shapes) - 1, steps if image_channels == 0 else steps - 1)
        for level in range(1, steps + 1):
            width = widths[level]
            if level <= self.num_skips:
                channels, stride = shapes[-1 - level]
                layers = max(0, round(math.log2(stride * 2**level / deepest[1])) - 1)
                self.skips.append(
                    UnetrPrUpBlock(
                        in_channels=channels,
                        out_channels=width,
                        num_layer=layers,
                        stride=1,
                        upsample_kernel_size=2,
                        conv_block=True,
                        **options,
                    )
                )
                self.ups.append(
                    UnetrUpBlock(in_channels=widths[level - 1], out_channels=width, upsample_kernel_size=2, **options)
                )
            elif level == steps and image_channels:
                self.skips.append(UnetrBasicBlock(in_channels=image_channels, out_channels=width, stride=1, **options))
                self.ups.append(
                    UnetrUpBlock(in_channels=widths[level - 1], out_channels=width, upsample_kernel_size=2, **options)
                )
            else:
                self.ups.append(
                    nn.Sequential(
                        nn.ConvTranspose2d(widths[level - 1], width, kernel_size=2, stride=2),
                        UnetrBasicBlock(in_channels=width, out_channels=width, stride=1, **options),
                    )
                )
        self.has_stem = image_channels > 0
        self.classify = nn.Conv2d(widths[-1], num_outputs, kernel_size=1)

    def forward(
        self, maps: Sequence[Tensor], images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Return logits at the image's size."""
        x = self.project(maps[-1])
        for level, up in enumerate(self.ups, start=1):
            if level <= self.num_skips:
                skip = self.skips[level - 1](maps[-1 - level])
                size = (2 * x.shape[-2], 2 * x.shape[-1])
                x = up(x, nn.functional.interpolate(skip, size=size, mode="bilinear") if skip.shape[-2:] != size else skip)
            elif level == len(self.ups) and self.has_stem:
                skip = self.skips[-1](images)
                size = (2 * x.shape[-2], 2 * x.shape[-1])
                x = up(x, nn.functional.interpolate(skip, size=size, mode="bilinear") if skip.shape[-2:] != size else skip)
            else:
                x = up(x)
        return to_size(self.classify(x), images)
