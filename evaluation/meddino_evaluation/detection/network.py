"""torchvision's detectors over any backbone: a pyramid of its levels or of its last map, then the library's heads."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.errors import ConfigError
from meddino_evaluation.adaptation.config import FinetuneConfig
from meddino_evaluation.adaptation.trainable import adapt, set_training_mode
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.detection.config import DetectorConfig, EncoderConfig

_NORMS = nn.modules.batchnorm._BatchNorm
_COARSEST = 32
"""Pixels: sides must be multiples of it, so that every level of the pyramid has whole cells."""


class Pyramid(nn.Module):
    """A backbone and the maps at rising strides that detectors look at.

    Args:
        encoder: Changed in place; what learns of it says `requires_grad`.
        levels: Maps before the library's own coarser ones.
        channels: Of every map.
        coarser: torchvision's block that adds coarser levels, built for so many channels.
        size_px: Side of the images.

    Attributes:
        strides: Pixels between cells of each level, the coarser ones included.
    """

    def __init__(self, encoder: Backbone, levels: int, channels: int, coarser: nn.Module, size_px: int) -> None:
        super().__init__()
        self.encoder, self.levels, self.out_channels = encoder, levels, channels
        self.is_sequence = encoder.network.is_sequence
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, encoder.contract.channels, size_px, size_px, device=_device(encoder)))
        self._check(maps, size_px)
        widths = [int(one.shape[1]) for one in maps]
        self.neck: nn.Module
        if self.is_sequence:
            self.neck = SimplePyramid(widths[-1], channels, levels, coarser)
        else:
            from torchvision.ops import FeaturePyramidNetwork

            self.neck = FeaturePyramidNetwork(widths, channels, extra_blocks=coarser)
        with torch.no_grad():
            sides = [int(one.shape[-1]) for one in self.neck.to(maps[0].device)(_named(maps)).values()]
        # Of small images the coarser levels are rounded up to a cell or two: their anchors double all the same.
        finest = size_px // sides[0]
        self.strides = [finest * 2**level for level in range(len(sides))]

    def forward(self, images: Float[Tensor, "batch channels h w"]) -> dict[str, Tensor]:
        """Return the maps of all levels, finest first."""
        learns = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            maps = self._maps(images)
        found: dict[str, Tensor] = self.neck(_named([one.float() for one in maps]))
        return found

    def train(self, mode: bool = True) -> "Pyramid":
        """As `nn.Module.train`; of the encoder only LoRA's dropout is switched, and no batch norm's statistics move."""
        super().train(mode)
        self.encoder.eval()
        if mode:
            set_training_mode(self.encoder)
        for module in self.encoder.modules():
            if isinstance(module, _NORMS):
                module.eval()
        return self

    def _maps(self, images: Tensor) -> list[Tensor]:
        if not self.is_sequence:
            return self.encoder.patch_maps(images, self.levels)
        (last,) = self.encoder.patch_maps(images, 1)
        # RoI pooling takes strides for powers of two; a patch of 14 pixels is none.
        side = images.shape[-1] // 2 ** round(math.log2(images.shape[-1] / last.shape[-1]))
        if side != last.shape[-1]:
            last = functional.interpolate(last, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return [last]

    def _check(self, maps: Sequence[Tensor], size_px: int) -> None:
        sides = [int(one.shape[-1]) for one in maps]
        whole = all(size_px % side == 0 and math.log2(size_px // side).is_integer() for side in sides)
        if not self.is_sequence and (len(maps) < self.levels or sides != sorted(set(sides), reverse=True) or not whole):
            raise ConfigError(
                f"model {self.encoder.name} gives maps of {sides} cells for {size_px} px; a feature pyramid needs "
                f"{self.levels} maps, each half as fine as the one before"
            )


class SimplePyramid(nn.Module):
    """Levels at 1/4, 1/2, 1 and 2 strides of the only map that a plain vision transformer has.

    Source: Li et al. 2022, Exploring plain vision transformer backbones for object detection, section 3 and appendix A.2.
    """

    def __init__(self, width: int, channels: int, levels: int, coarser: nn.Module) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d

        half, quarter = max(1, width // 2), max(1, width // 4)
        up, finer = nn.ConvTranspose2d(width, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        scales: list[tuple[nn.Module, int]] = [
            (nn.Sequential(up, LayerNorm2d(half), nn.GELU(), finer), quarter),
            (nn.ConvTranspose2d(width, half, 2, 2), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2, 2), width),
        ]
        self.scales = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(inner, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, inner in scales[-levels:]
        )
        self.coarser = coarser

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all levels by name, finest first."""
        (last,) = maps.values()
        found = [scale(last) for scale in self.scales]
        names = [str(place) for place in range(len(found))]
        found, names = self.coarser(found, found, names)
        return OrderedDict(zip(names, found, strict=True))


def build_detector(
    backbone: Backbone, encoder: EncoderConfig, config: DetectorConfig, classes: int, size_px: int, seed: int
) -> nn.Module:
    """Build torchvision's Faster R-CNN or RetinaNet on a backbone.

    Args:
        backbone: Becomes part of the detector (`detector.backbone.encoder`) and is changed.
        encoder: What of it learns.
        config: Which detector.
        classes: Without the background, which is number 0.
        size_px: Side of the images, which come normalised and of this size.
        seed: Of all fresh weights.

    Raises:
        ConfigError: The size or the backbone does not fit.
    """
    backbone.contract.check_size(size_px, backbone.name)
    step = math.lcm(_COARSEST, backbone.contract.multiple_px)
    if size_px % step:
        below = max(step, size_px // step * step)
        raise ConfigError(
            f"data.image_size_px {size_px}: a feature pyramid on {backbone.name} needs a multiple of {step}, such as "
            f"{below} or {below + step}"
        )
    backbone.requires_grad_(False)
    if encoder.mode != "frozen":
        settings = FinetuneConfig(
            partial_stages=encoder.partial_stages,
            lora_rank=encoder.lora_rank,
            lora_alpha=encoder.lora_alpha,
            lora_dropout=encoder.lora_dropout,
        )
        adapt(backbone, encoder.mode, settings, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = (_faster_rcnn if config.name == "faster_rcnn" else _retinanet)(backbone, config, classes, size_px)
    return detector.to(_device(backbone))


def _faster_rcnn(backbone: Backbone, config: DetectorConfig, classes: int, size_px: int) -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    levels, channels = 4, config.pyramid_channels
    pyramid = Pyramid(backbone, levels, channels, LastLevelMaxPool(), size_px)
    pooling = MultiScaleRoIAlign([str(level) for level in range(levels)], output_size=7, sampling_ratio=2)
    sizes = [((config.anchor_strides or 8) * stride,) for stride in pyramid.strides]
    detector: nn.Module = FasterRCNN(
        pyramid,
        rpn_anchor_generator=_anchors(sizes),
        box_roi_pool=pooling,
        box_head=TwoMLPHead(channels * 49, config.box_head_width),
        box_predictor=FastRCNNPredictor(config.box_head_width, classes + 1),
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_iou,
        box_detections_per_img=config.detections_per_image,
        **_as_given(backbone, size_px),
    )
    return detector


def _retinanet(backbone: Backbone, config: DetectorConfig, classes: int, size_px: int) -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    channels = config.pyramid_channels
    pyramid = Pyramid(backbone, 3, channels, LastLevelP6P7(channels, channels), size_px)
    side = config.anchor_strides or 4
    detector: nn.Module = RetinaNet(
        pyramid,
        classes + 1,
        anchor_generator=_anchors(
            [tuple(side * stride * 2 ** (third / 3) for third in range(3)) for stride in pyramid.strides]
        ),
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_iou,
        detections_per_img=config.detections_per_image,
        **_as_given(backbone, size_px),
    )
    return detector


def _anchors(sizes: Sequence[tuple[float, ...]]) -> nn.Module:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    generator: nn.Module = AnchorGenerator(tuple(sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    return generator


def _as_given(backbone: Backbone, size_px: int) -> dict[str, Any]:
    """Return options with which torchvision's own resizing and normalising change nothing."""
    channels = backbone.contract.channels
    same = {"min_size": size_px, "max_size": size_px, "fixed_size": (size_px, size_px), "size_divisible": 1}
    return same | {"image_mean": [0.0] * channels, "image_std": [1.0] * channels}


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return OrderedDict((str(place), one) for place, one in enumerate(maps))


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device
