"""Multi-crop for CT: boxes drawn as a pure function of the sample, cut from int16, resized without PIL."""

from bisect import bisect_right
from itertools import accumulate
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int16
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng

GLOBAL_CROPS = 2
_TRIES = 10
_DRAWS = 4 * _TRIES + 1  # what one crop takes from the sample's generator: area, shape, y, x of each try; flip

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class CropSizes(StrictConfig):
    """The sizes of all crops of a step; a stage of several resolutions has several of these and draws one a step."""

    global_px: Annotated[int, Field(gt=0, description="side of the 2 global crops [px]; paper: 256, stage 3: 512 and 768")]
    local_px: Annotated[int, Field(gt=0, description="side of the local crops [px]; paper: 112, stage 3: 112 to 336")]
    gram_px: Annotated[
        int | None,
        Field(gt=0, description="side of the Gram teacher's crops [px]; DINOv3: 2 x global_px; null: no Gram teacher"),
    ] = None
    weight: Annotated[
        float, Field(gt=0, description="share of the steps that take these sizes, relative to the others; DINOv3: .3 and .05")
    ] = 1.0


class CropsConfig(StrictConfig):
    """How crops are cut from a slice."""

    sizes: Annotated[
        tuple[CropSizes, ...], Field(min_length=1, description="sizes to draw from, once a step for all ranks; stage 1: one")
    ] = (CropSizes(global_px=256, local_px=112),)
    num_local: Annotated[int, Field(ge=0, description="local crops of each slice; paper and DINOv3: 8")] = 8
    global_scale: Annotated[
        tuple[Fraction, Fraction], Field(description="share of the slice's area in a global crop [0-1]; paper: 0.32-1.0")
    ] = (0.32, 1.0)
    local_scale: Annotated[
        tuple[Fraction, Fraction], Field(description="share of the slice's area in a local crop [0-1]; paper: 0.05-0.32")
    ] = (0.05, 0.32)
    aspect_ratio: Annotated[
        tuple[float, float], Field(description="width / height of a crop's box in millimetres; torchvision and DINOv3: 3/4-4/3")
    ] = (0.75, 1.3333333333333333)
    flip_probability: Annotated[
        Probability, Field(description="chance of a horizontal flip of each crop [0-1]; DINOv3, FlexiCT: 0.5")
    ] = 0.5

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "CropsConfig":
        for name in ("global_scale", "local_scale", "aspect_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} {[low, high]} must ascend and be above 0")
        if len({sizes.gram_px is None for sizes in self.sizes}) > 1:
            raise ValueError("gram_px must be set for all sizes or for none")
        return self

    def check_patch_size(self, patch_size: int) -> None:
        """Refuse sizes that do not divide into patches.

        Args:
            patch_size: Side of a patch [px].

        Raises:
            ConfigError: Names each size that does not divide.
        """
        wrong = [
            f"crops.sizes.{number}.{name}={value}"
            for number, sizes in enumerate(self.sizes)
            for name, value in (("global_px", sizes.global_px), ("local_px", sizes.local_px), ("gram_px", sizes.gram_px))
            if value is not None and value % patch_size
        ]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: not a multiple of the patch size {patch_size}")


def crop_sizes_for_step(config: CropsConfig, seed: int, step: int) -> CropSizes:
    """Return the crop sizes of a step: the same on every rank, and whenever it is asked.

    Args:
        config: Gives the sizes and their weights.
        seed: The stage's seed.
        step: Optimizer step.
    """
    if len(config.sizes) == 1:
        return config.sizes[0]
    ends = list(accumulate(sizes.weight for sizes in config.sizes))
    place = numpy_rng(seed, "crop-sizes", step).random() * ends[-1]
    return config.sizes[min(bisect_right(ends, place), len(ends) - 1)]


class CropBox(NamedTuple):
    """A box in pixels of the slice, and whether the crop is turned left to right."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def draw_boxes(
    config: CropsConfig, seed: int, number: int, shape: tuple[int, ...], spacing_mm: tuple[float, float]
) -> list[CropBox]:
    """Draw the boxes of all crops of a sample, global ones first.

    The box of crop c depends on the seed, the sample's number and c alone: not on how many crops follow.

    Args:
        config: Scales, shape, flips.
        seed: The stage's seed.
        number: Global sample number.
        shape: (rows, cols) of the slice [px].
        spacing_mm: (y, x) between pixel centres; the shape of a box is drawn in millimetres.

    Source: Szegedy et al. 2015 and torchvision's RandomResizedCrop (area uniform, log-ratio uniform, ten tries, then the
    largest box of an allowed shape). Difference: the ratio is that of millimetres, so pixels need not be square.
    """
    draws = numpy_rng(seed, "boxes", number).random((GLOBAL_CROPS + config.num_local, _DRAWS))
    rows, cols = shape
    pixel_ratio = spacing_mm[0] / spacing_mm[1]
    boxes = []
    for crop, row in enumerate(draws):
        scale = config.global_scale if crop < GLOBAL_CROPS else config.local_scale
        top, left, height, width = _draw_box(row, scale, config.aspect_ratio, rows, cols, pixel_ratio)
        boxes.append(CropBox(top, left, height, width, bool(row[-1] < config.flip_probability)))
    return boxes


def _draw_box(
    draws: NDArray[np.float64],
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    rows: int,
    cols: int,
    pixel_ratio: float,
) -> tuple[int, int, int, int]:
    low, high = np.log(aspect_ratio)
    for area_draw, ratio_draw, y_draw, x_draw in draws[:-1].reshape(_TRIES, 4):
        area = rows * cols * (scale[0] + area_draw * (scale[1] - scale[0]))
        ratio = np.exp(low + ratio_draw * (high - low)) * pixel_ratio  # width / height in pixels
        height, width = max(1, round(np.sqrt(area / ratio))), max(1, round(np.sqrt(area * ratio)))
        if height <= rows and width <= cols:
            return int(y_draw * (rows - height + 1)), int(x_draw * (cols - width + 1)), height, width
    ratio = min(max(cols / rows, aspect_ratio[0] * pixel_ratio), aspect_ratio[1] * pixel_ratio)
    height, width = max(1, min(rows, round(cols / ratio))), max(1, min(cols, round(rows * ratio)))
    return (rows - height) // 2, (cols - width) // 2, height, width


def cut_crop(hu: NDArray[np.int16], box: CropBox, size_px: int) -> Int16[Tensor, "h w"]:
    """Cut a box out of a slice and resize it to a square: bicubic, with antialiasing where it shrinks.

    Args:
        hu: int16 [rows, cols] in Hounsfield units.
        box: Where to cut.
        size_px: Side of the crop.

    Returns:
        int16 [size_px, size_px] in Hounsfield units, never outside the box's own range: bicubic overshoot at an edge
        would be darker than any air.
    """
    top, left, height, width, flipped = box
    cut = hu[top : top + height, left : left + width]
    image = torch.from_numpy(cut.astype(np.float32))[None, None]
    if (height, width) != (size_px, size_px):
        image = F.interpolate(image, size=(size_px, size_px), mode="bicubic", align_corners=False, antialias=True)
        image = image.clamp_(int(cut.min()), int(cut.max())).round_()
    if flipped:
        image = image.flip(-1)
    return image[0, 0].to(torch.int16)
