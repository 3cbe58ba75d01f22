"""Views of a slice: boxes drawn as a pure function of the sample, cut from stored values, resized without PIL."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.seeds import numpy_rng
from meddino_pretrain.data.views import ViewSpec

_TRIES = 10
_DRAWS = 4 * _TRIES + 1  # what one view takes from the sample's generator: area, shape, y, x of each try; flip


class CropBox(NamedTuple):
    """A box in pixels of the slice, and whether the crop is turned left to right."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def draw_boxes(
    spec: ViewSpec, seed: int, number: int, shape: tuple[int, ...], spacing_mm: tuple[float, float]
) -> dict[str, list[CropBox]]:
    """Draw the boxes of all views of a sample; kinds that take another's boxes get the same ones.

    The box of view v depends on the seed, the sample's number and v alone: not on how many views follow.

    Args:
        spec: Kinds of views, shape, flips.
        seed: The stage's seed.
        number: Global sample number.
        shape: (rows, cols) of the slice [px].
        spacing_mm: (y, x) between pixel centres; the shape of a box is drawn in millimetres.

    Source: Szegedy et al. 2015 and torchvision's RandomResizedCrop (area uniform, log-ratio uniform, ten tries). Differences:
    the ratio is that of millimetres, so pixels need not be square; and where ten tries do not fit, as on slices four times as
    long as wide, the box is drawn among those that do (`_fitting_box`) instead of being the one in the middle every time.
    """
    areas = [view.area for view in spec.drawn.values() for _ in range(view.count)]
    draws = numpy_rng(seed, "boxes", number).random((len(areas), _DRAWS))
    rows, cols = shape
    pixel_ratio = spacing_mm[0] / spacing_mm[1]
    boxes = [
        CropBox(*_draw_box(row, area, spec.aspect_ratio, rows, cols, pixel_ratio), bool(row[-1] < spec.flip_probability))
        for row, area in zip(draws, areas, strict=True)
    ]
    return {name: boxes[spec.rows_of(name)] for name in spec.views}


def _draw_box(
    draws: NDArray[np.float64],
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    rows: int,
    cols: int,
    pixel_ratio: float,
) -> tuple[int, int, int, int]:
    low, high = np.log(aspect_ratio)
    tries = draws[:-1].reshape(_TRIES, 4)
    for area_draw, ratio_draw, y_draw, x_draw in tries:
        area = rows * cols * (scale[0] + area_draw * (scale[1] - scale[0]))
        ratio = np.exp(low + ratio_draw * (high - low)) * pixel_ratio  # width / height in pixels
        height, width = max(1, round(np.sqrt(area / ratio))), max(1, round(np.sqrt(area * ratio)))
        if height <= rows and width <= cols:
            return int(y_draw * (rows - height + 1)), int(x_draw * (cols - width + 1)), height, width
    # The places of boxes that did not fit were never looked at: fresh numbers, while areas and shapes are known not to fit.
    area_draw, ratio_draw = tries[0, 2:]
    y_draw, x_draw = tries[1, 2:]
    ratio = np.exp(low + ratio_draw * (high - low)) * pixel_ratio
    return _fitting_box((area_draw, y_draw, x_draw), scale, float(ratio), rows, cols)


def _fitting_box(
    draws: tuple[float, float, float], scale: tuple[float, float], ratio: float, rows: int, cols: int
) -> tuple[int, int, int, int]:
    """Return a box of a given shape that fits: area uniform over what is allowed and fits, place uniform.

    Where even the smallest allowed area does not fit in this shape, it is the largest box of the shape.

    Args:
        draws: Area, y and x, each in [0, 1).
        scale: Share of the slice's area, from and to.
        ratio: Width over height in pixels.
        rows: Of the slice.
        cols: Of the slice.
    """
    largest = min(rows * rows * ratio, cols * cols / ratio)
    low, high = (min(share * rows * cols, largest) for share in scale)
    area = low + draws[0] * (high - low)
    height, width = (
        min(side, max(1, round(float(size)))) for side, size in ((rows, np.sqrt(area / ratio)), (cols, np.sqrt(area * ratio)))
    )
    return int(draws[1] * (rows - height + 1)), int(draws[2] * (cols - width + 1)), height, width


def repeated_box(sides: tuple[float, float], seed: int, number: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rows and columns that a repeated slice is cut to, drawn for the sample.

    Args:
        sides: Share of each side, from and to.
        seed: The stage's seed.
        number: Global sample number.
        shape: (rows, cols) of the slice [px].

    Source: LVM-Med, which resizes the cut back; views are resized anyway.
    """
    share, *places = numpy_rng(seed, "repeat", number).random(3)
    side = sides[0] + share * (sides[1] - sides[0])
    lengths = [max(1, round(side * length)) for length in shape[:2]]
    starts = [int(place * (length - kept + 1)) for place, length, kept in zip(places, shape, lengths, strict=False)]
    rows, cols = (slice(start, start + kept) for start, kept in zip(starts, lengths, strict=True))
    return rows, cols


def cut_crop(stored: NDArray[Any], box: CropBox, size_px: int) -> Int16[Tensor, "h w"] | Float[Tensor, "*c h w"]:
    """Cut a box out of a slice and resize it to a square: bicubic, with antialiasing where it shrinks.

    Args:
        stored: [rows, cols], or [rows, cols, 3] of a colour picture.
        box: Where to cut.
        size_px: Side of the crop.

    Returns:
        [size_px, size_px], of colour [3, size_px, size_px]: int16 where int16 is stored, else float32. Never outside the box's
        own range: bicubic overshoot at an edge would be darker than any air.
    """
    top, left, height, width, flipped = box
    cut = stored[top : top + height, left : left + width]
    whole = cut.dtype == np.int16
    image = torch.from_numpy(cut.astype(np.float32))[None]
    image = image[None] if image.ndim == 3 else image.permute(0, 3, 1, 2)
    if (height, width) != (size_px, size_px):
        image = F.interpolate(image, size=(size_px, size_px), mode="bicubic", align_corners=False, antialias=True)
        image = image.clamp_(float(cut.min()), float(cut.max()))
        image = image.round_() if whole else image
    if flipped:
        image = image.flip(-1)
    crop = image[0, 0] if cut.ndim == 2 else image[0]
    return crop.to(torch.int16) if whole else crop
