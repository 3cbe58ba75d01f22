"""How an image becomes the input of a backbone, whether it was trained on Hounsfield units or on photographs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meddino.core.errors import ConfigError
from meddino.data.intensity import CTIntensity

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEFAULT_WINDOW_HU = (-1000.0, 1000.0)
"""HU window for models that have none of their own: MedDINOv3's, so that every model sees the same range."""


@dataclass(frozen=True)
class ImageContract:
    """What a backbone wants.

    Attributes:
        mean: Of each channel: of values in [0, 1] for photographic models.
        std: Likewise.
        multiple_px: Image sides must be a multiple of this.
        native_size_px: Side the weights were trained at.
        hu: The contract of a model that was trained on Hounsfield units; mean and std are then not used.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    multiple_px: int = 1
    native_size_px: int = 224
    hu: CTIntensity | None = None

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.hu.channels if self.hu else len(self.mean)

    @property
    def window_hu(self) -> tuple[float, float]:
        """The HU window that fits the model best."""
        return (self.hu.hu_min, self.hu.hu_max) if self.hu else DEFAULT_WINDOW_HU

    def check_size(self, size_px: int, name: str) -> None:
        """Refuse a size that the model cannot take.

        Raises:
            ConfigError: Names the nearest sizes that fit.
        """
        if size_px < 1 or size_px % self.multiple_px:
            below = max(self.multiple_px, size_px // self.multiple_px * self.multiple_px)
            raise ConfigError(
                f"image size {size_px} px does not fit {name}, whose sides must be multiples of {self.multiple_px}: "
                f"use {below} or {below + self.multiple_px}"
            )

    def from_unit(self, unit: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out_channels h w"]:
        """Turn images in [0, 1], grey or RGB, into model input.

        A model of Hounsfield units gets them stretched over its window: 0 becomes hu_min, 1 becomes hu_max.
        """
        channels = self.channels
        if unit.shape[1] != channels:
            unit = unit.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if self.hu is not None:
            values = unit * (self.hu.hu_max - self.hu.hu_min) + self.hu.hu_min
            return (values - self.hu.mean) / self.hu.std
        mean = torch.tensor(self.mean, device=unit.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=unit.device).view(1, -1, 1, 1)
        return (unit - mean) / std

    def from_hu(
        self, hu: Float[Tensor, "batch 1 h w"], window: tuple[float, float] | None = None
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Turn Hounsfield units into model input.

        Args:
            hu: One channel.
            window: Lower and upper end [HU]; None takes `window_hu`.
        """
        low, high = window or self.window_hu
        return self.from_unit((hu.clamp(low, high) - low) / (high - low))
