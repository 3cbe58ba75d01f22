"""Whole slices from windows: MONAI's sliding window, mirrored if asked, in batches that fit the memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger

logger = get_logger(__name__)

Predictor = Callable[[Tensor], Tensor]


def window_starts(size: int, window: int, step: float) -> list[int]:
    """Return where windows start along one axis: every `step` of a window, the last one moved back to the border.

    Args:
        size: Pixels along the axis, at least `window`.
        window: Pixels of a window.
        step: In (0, 1].
    """
    if size < window:
        raise ValueError(f"{size} pixels hold no window of {window}")
    interval = max(1, int(window * step))
    starts = list(range(0, size - window, interval))
    return [*starts, size - window]


def pad_amounts(size: int, window: int) -> tuple[int, int]:
    """Return the pixels to add before and after an axis so that one window fits."""
    lacking = max(window - size, 0)
    return lacking // 2, lacking - lacking // 2


@dataclass
class SlidingWindow:
    """How slices are cut and put together again.

    Attributes:
        window_px: Side of a window.
        step: Step between windows, in windows.
        gaussian: Weight windows by a Gaussian of an eighth of their side; else evenly.
        mirror: Average over the four mirrorings.
        batch_size: Windows a forward; halved, with a warning, when memory runs out.
    """

    window_px: int
    step: float = 0.5
    gaussian: bool = True
    mirror: bool = False
    batch_size: int = 8

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels rows cols"], predict: Predictor, pad_value: float
    ) -> Float[Tensor, "batch outputs rows cols"]:
        """Predict slices of one size.

        Args:
            images: As the network wants them.
            predict: Returns logits at its input's size.
            pad_value: Filled in around slices that are smaller than a window.

        Raises:
            MedDINOError: Even a single window does not fit the memory.
        """
        # MONAI takes seconds to import: only where something is predicted.
        from monai.inferers import sliding_window_inference

        window, blended = self.window_px, max(images.shape[2:]) > self.window_px
        while True:
            try:
                found: Tensor = sliding_window_inference(
                    images,
                    (window, window),
                    self.batch_size,
                    lambda crops: self._forward(crops, predict),
                    overlap=1 - self.step,
                    mode="gaussian" if self.gaussian and blended else "constant",
                    cval=pad_value,
                )
                return found
            except RuntimeError as error:
                # The CPU's allocator raises a plain RuntimeError.
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                if self.batch_size == 1:
                    raise MedDINOError(
                        f"a single window of {window} x {window} pixels does not fit the memory; set a smaller training.crop_px"
                    ) from error
            self.batch_size = max(1, min(self.batch_size, len(images)) // 2)
            logger.warning("out of memory: going on with inference.batch_size=%d", self.batch_size)

    def _forward(self, crops: Tensor, predict: Predictor) -> Tensor:
        logits = predict(crops).float()
        if not self.mirror:
            return logits
        for axes in ((3,), (2,), (2, 3)):
            logits = logits + predict(crops.flip(axes)).float().flip(axes)
        return logits / 4
