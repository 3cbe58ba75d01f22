"""Whole slices from windows: overlapping, weighted by a Gaussian, mirrored if asked, in batches that fit the memory."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger

logger = get_logger(__name__)

Predictor = Callable[[Tensor], Tensor]
GAUSSIAN_SIGMA = 0.125
"""Standard deviation of the weights over the window's side [nnU-Net, MONAI]."""
SMALLEST_WEIGHT = 1e-3


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


def gaussian_weights(rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    """Return the weight of each pixel of a window: a Gaussian about its centre, never below 1e-3."""
    axes = []
    for size in (rows, cols):
        offset = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        axes.append(torch.exp(-(offset**2) / (2 * (GAUSSIAN_SIGMA * size) ** 2)))
    weights = axes[0][:, None] * axes[1][None]
    return weights.clamp_min(max(float(weights.min()), SMALLEST_WEIGHT))


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
        gaussian: Weight windows by a Gaussian; else evenly.
        mirror: Average over the four mirrorings.
        batch_size: Windows a forward; halved, with a warning, when memory runs out.
    """

    window_px: int
    step: float = 0.5
    gaussian: bool = True
    mirror: bool = False
    batch_size: int = 8
    _weights: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _totals: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels rows cols"], predict: Predictor, pad_value: Float[Tensor, ""] | float
    ) -> Float[Tensor, "batch outputs rows cols"]:
        """Predict slices of one size.

        Args:
            images: As the network wants them.
            predict: Returns logits at its input's size.
            pad_value: Filled in around slices that are smaller than a window.

        Raises:
            MedDINOError: Even a single window does not fit the memory.
        """
        window = self.window_px
        top, bottom = pad_amounts(images.shape[2], window)
        left, right = pad_amounts(images.shape[3], window)
        padded = F.pad(images, (left, right, top, bottom), value=float(pad_value)) if top + bottom + left + right else images
        rows, cols = padded.shape[2:]
        corners = list(itertools.product(window_starts(rows, window, self.step), window_starts(cols, window, self.step)))
        out = self._forward_all(padded, predict) if len(corners) == 1 else self._blend(padded, predict, corners)
        return out[:, :, top : rows - bottom, left : cols - right]

    def _forward_all(self, images: Tensor, predict: Predictor) -> Tensor:
        parts, start = [], 0
        while start < len(images):
            part = images[start : start + self.batch_size]
            logits = self._forward(part, predict)
            if logits is not None:  # else the batch was halved: try again from the same place
                parts.append(logits)
                start += len(part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _blend(self, images: Tensor, predict: Predictor, corners: list[tuple[int, int]]) -> Tensor:
        window, (rows, cols) = self.window_px, images.shape[2:]
        places = [(image, corner) for image in range(len(images)) for corner in corners]
        summed: Tensor | None = None
        start = 0
        while start < len(places):
            group = places[start : start + self.batch_size]
            cut = torch.stack([images[i, :, y : y + window, x : x + window] for i, (y, x) in group])
            logits = self._forward(cut, predict)
            if logits is None:
                continue
            if summed is None:
                summed = logits.new_zeros((len(images), logits.shape[1], rows, cols))
            weights = self._weight_map(logits)
            for (i, (y, x)), part in zip(group, logits, strict=True):
                # Weighted and added in one pass over a window that is still in the cache.
                summed[i, :, y : y + window, x : x + window].addcmul_(part, weights)
            start += len(group)
        if summed is None:
            raise ValueError("no images")
        return summed.div_(self._total(rows, cols, corners, summed))

    def _forward(self, images: Tensor, predict: Predictor) -> Tensor | None:
        try:
            if not self.mirror:
                return predict(images).float()
            logits = predict(images).float()
            for axes in ((3,), (2,), (2, 3)):
                logits = logits + predict(images.flip(axes)).float().flip(axes)
            return logits / 4
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(images) == 1:
                raise MedDINOError(
                    f"a single window of {self.window_px} x {self.window_px} pixels does not fit the memory; "
                    "choose a smaller training.crop_px"
                ) from error
        self.batch_size = max(1, len(images) // 2)
        logger.warning(
            "out of memory with %d windows at once: going on with inference.batch_size=%d", len(images), self.batch_size
        )
        return None

    def _weight_map(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._weights:
            side = self.window_px
            weights = gaussian_weights(side, side) if self.gaussian else torch.ones(side, side)
            self._weights[key] = weights.to(like)
        return self._weights[key]

    def _total(self, rows: int, cols: int, corners: list[tuple[int, int]], like: Tensor) -> Tensor:
        key = (rows, cols, like.device)
        if key not in self._totals:
            weights, window = self._weight_map(like), self.window_px
            total = like.new_zeros((rows, cols))
            for y, x in corners:
                total[y : y + window, x : x + window] += weights
            self._totals[key] = total
        return self._totals[key]


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)
