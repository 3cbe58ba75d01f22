"""A fixed set of slices on which a run is looked at again and again, each in two views."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.errors import ShardError
from meddino.core.logging import get_logger
from meddino.core.seeds import numpy_rng
from meddino.data.contract import InputContract
from meddino.data.model_input import to_uint8_window
from meddino_pretrain.data.augmentations import apply_intensity
from meddino_pretrain.data.crops import CropBox, cut_crop
from meddino_pretrain.data.loader import SliceSource

# The second view: mirrored, a narrower window, a gamma curve, the noise of a thinner dose, half the resolution.
_WINDOW_HU, _GAMMA, _NOISE_HU, _ZOOM = (-360.0, 440.0), 1.25, 20.0, 0.5
_AIR_HU = -950
logger = get_logger(__name__)


@dataclass(frozen=True)
class FixedSlices:
    """Slices in two views that show the same anatomy in other grey values.

    Attributes:
        first_view: [n, C, H, W] model input, undistorted, the contract's own window.
        second_view: [n, C, H, W] model input, mirrored left to right, other window and gamma, noisier and coarser. Being
            mirrored, what a model knows of a patch by its position alone does not help to find it again.
        grey: [n, H, W] the first view for people.
        body: [n, H, W] True where the first view is denser than air: elsewhere one patch is as good as another.
        keys: The slices' keys.
    """

    first_view: Float[Tensor, "n c h w"]
    second_view: Float[Tensor, "n c h w"]
    grey: UInt8[Tensor, "n h w"]
    body: Bool[Tensor, "n h w"]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.keys)


def fixed_slices(corpus: SliceSource, contract: InputContract, count: int, size_px: int) -> FixedSlices:
    """Take slices at even distances through a corpus: the same ones whenever it is asked.

    Args:
        corpus: Where slices are read.
        contract: The model's input contract.
        count: Slices wanted; fewer if the corpus has fewer.
        size_px: Side of the views; the largest square (in millimetres) in the middle of a slice is resized to it.

    Raises:
        ShardError: Not one of the slices can be read.
    """
    count = min(count, len(corpus))
    first, second, keys = [], [], []
    for place in range(count):
        index = (2 * place + 1) * len(corpus) // (2 * count)
        try:
            hu = corpus.read(index)
        except ShardError as error:
            logger.warning("a slice for looking at the run is damaged and left out: %s", error)
            continue
        y_mm, x_mm = corpus.spacing_mm[index].tolist()
        box = _middle_square(hu.shape, y_mm, x_mm)
        first.append(cut_crop(hu, box, size_px))
        second.append(_second_view(hu, box, size_px, index))
        keys.append(corpus.key(index))
    if not keys:
        raise ShardError(f"corpus {corpus.root}: none of the {count} slices for looking at the run can be read")
    hu_first, hu_second = torch.stack(first), torch.stack(second)
    plain = torch.tensor([[contract.hu_min, contract.hu_max, 1.0, 1.0]]).expand(len(keys), 4)
    other = torch.tensor([[*_WINDOW_HU, _GAMMA, 1.0]]).expand(len(keys), 4)
    return FixedSlices(
        apply_intensity(hu_first, plain, contract),
        apply_intensity(hu_second, other, contract),
        to_uint8_window(hu_first),
        hu_first > _AIR_HU,
        tuple(keys),
    )


def _middle_square(shape: tuple[int, ...], y_mm: float, x_mm: float) -> CropBox:
    rows, cols = shape
    side_mm = min(rows * y_mm, cols * x_mm)
    height, width = max(1, min(rows, round(side_mm / y_mm))), max(1, min(cols, round(side_mm / x_mm)))
    return CropBox((rows - height) // 2, (cols - width) // 2, height, width, False)


def _second_view(hu: NDArray[np.int16], box: CropBox, size_px: int, index: int) -> Tensor:
    small_px = max(1, round(size_px * _ZOOM))
    small = cut_crop(hu, box._replace(flipped=True), small_px).numpy()
    noisy = small + numpy_rng(0, "second-view", index).normal(0, _NOISE_HU, small.shape)
    whole = CropBox(0, 0, small_px, small_px, False)
    return cut_crop(np.rint(noisy).clip(-32768, 32767).astype(np.int16), whole, size_px)
