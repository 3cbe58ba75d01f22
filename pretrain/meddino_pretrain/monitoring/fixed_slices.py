"""A fixed set of slices on which features are measured again and again, each in two views."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from meddino.core.errors import ShardError
from meddino.core.logging import get_logger
from meddino.core.seeds import numpy_rng
from meddino.data.model_input import is_foreground, to_picture
from meddino_pretrain.data.crops import CropBox, cut_crop
from meddino_pretrain.data.intensities import Intensities, StoredSlice
from meddino_pretrain.data.loader import SliceSource

# The second view: mirrored, another contrast (of CT also a narrower window), noisier as of a thinner dose, half the resolution.
_CT_WINDOW_HU, _CT_NOISE_HU = (-360.0, 440.0), 20.0
_CONTRAST, _NOISE, _ZOOM = 1.25, 0.02, 0.5
PICTURED, _PICTURED_PX = 6, 256  # slices that are drawn, and the side at which patches become worth looking at
logger = get_logger(__name__)


@dataclass(frozen=True)
class FixedSlices:
    """Slices in two views that show the same anatomy in other grey values.

    Attributes:
        first_view: [n, C, H, W] model input, undistorted, the contract's own window.
        second_view: [n, C, H, W] model input, mirrored left to right, other window and gamma, noisier and coarser. Being
            mirrored, what a model knows of a patch by its position alone does not help to find it again.
        grey: [n, H, W] the first view for people.
        body: [n, H, W] True where the first view shows more than air or darkness: elsewhere one patch is as good as another.
        keys: The slices' keys.
        pictured: A few of them, as large as pictures need; None where nobody draws.
    """

    first_view: Float[Tensor, "n c h w"]
    second_view: Float[Tensor, "n c h w"]
    grey: UInt8[Tensor, "n h w"]
    body: Bool[Tensor, "n h w"]
    keys: tuple[str, ...]
    pictured: "FixedSlices | None" = None

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.keys)


def fixed_slices(
    corpus: SliceSource, intensities: Intensities, count: int, size_px: int, pictured: bool = False
) -> FixedSlices:
    """Take slices at even distances through a corpus: the same ones whenever it is asked.

    Args:
        corpus: Where slices are read.
        intensities: How they become model input.
        count: Slices wanted; fewer if the corpus has fewer.
        size_px: Side of the views; the largest square (in millimetres) in the middle of a slice is resized to it.
        pictured: Also a few slices whose side is the first multiple of `size_px` from 256 px on, for `probe_pictures`.

    Raises:
        ShardError: Not one of the slices can be read.
    """
    count = min(count, len(corpus))
    seen: list[_Seen] = []
    for number in range(count):
        index = (2 * number + 1) * len(corpus) // (2 * count)
        try:
            seen.append(_see(corpus, index, intensities, size_px))
        except ShardError as error:
            logger.warning("a slice for probing is corrupt and left out: %s", error)
    if not seen:
        raise ShardError(f"corpus {corpus.root}: none of the {count} slices for probing can be read")
    first, first_rows, second, second_rows, grey, body, keys = zip(*seen, strict=True)
    return FixedSlices(
        intensities.apply(torch.stack(first), torch.cat(first_rows)),
        intensities.apply(torch.stack(second), torch.cat(second_rows)),
        torch.stack(grey),
        torch.stack(body),
        keys,
        fixed_slices(corpus, intensities, PICTURED, -(-_PICTURED_PX // size_px) * size_px) if pictured else None,
    )


class _Seen(NamedTuple):
    first: Tensor
    first_row: Tensor
    second: Tensor
    second_row: Tensor
    grey: Tensor
    body: Tensor
    key: str


def _see(corpus: SliceSource, index: int, intensities: Intensities, size_px: int) -> _Seen:
    stored = StoredSlice(corpus.read(index), corpus.modality(index), corpus.value_range(index))
    y_mm, x_mm = corpus.spacing_mm[index].tolist()
    box = _middle_square(stored.values.shape[:2], y_mm, x_mm)
    first = cut_crop(stored.values, box, size_px)
    shown = first if first.ndim == 2 else first.mean(0)
    value_range = None if stored.value_range is None else torch.tensor(stored.value_range)
    return _Seen(
        intensities.on_host(first),
        torch.from_numpy(intensities.plain(stored)),
        intensities.on_host(_second_view(stored, box, size_px, index)),
        torch.from_numpy(intensities.chosen(stored, _CT_WINDOW_HU, _CONTRAST)),
        to_picture(shown, stored.modality, value_range),
        is_foreground(shown, stored.modality, value_range),
        corpus.key(index),
    )


def _middle_square(shape: tuple[int, ...], y_mm: float, x_mm: float) -> CropBox:
    rows, cols = shape
    side_mm = min(rows * y_mm, cols * x_mm)
    height, width = max(1, min(rows, round(side_mm / y_mm))), max(1, min(cols, round(side_mm / x_mm)))
    return CropBox((rows - height) // 2, (cols - width) // 2, height, width, False)


def _second_view(stored: StoredSlice, box: CropBox, size_px: int, index: int) -> Tensor:
    small_px = max(1, round(size_px * _ZOOM))
    small = cut_crop(stored.values, box._replace(flipped=True), small_px).numpy()
    noise_sd = _CT_NOISE_HU if stored.modality == "ct" else _NOISE * stored.span
    noisy = small + numpy_rng(0, "second-view", index).normal(0, noise_sd, small.shape)
    if small.dtype == np.int16:
        noisy = np.rint(noisy).clip(-32768, 32767)
    coarse = noisy.astype(small.dtype)
    whole = CropBox(0, 0, small_px, small_px, False)
    return cut_crop(coarse if coarse.ndim == 2 else np.moveaxis(coarse, 0, -1), whole, size_px)
