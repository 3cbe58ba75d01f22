"""How an image becomes the input of a backbone, whatever modality it was trained on, medical or photographs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meddino.core.errors import ConfigError
from meddino.data.intensity import CTIntensity, Intensity, Modality
from meddino.data.model_input import check_modality

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEFAULT_CT = CTIntensity()
"""Says the window in which models without one of their own see CT: MedDINOv3's, so that every model sees the same range."""


@dataclass(frozen=True)
class ImageContract:
    """What a backbone wants.

    Attributes:
        mean: Of each channel: of values in [0, 1] for photographic models.
        std: Standard deviation of each channel, in the units of `mean`.
        multiple_px: Image sides must be a multiple of this.
        native_size_px: Side the weights were trained at.
        own: The input contract of a model of ours; mean and std are then not used.
        given: Modality of what it is given. Values of another one than CT come scaled, so that their range is [0, 1].
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    multiple_px: int = 1
    native_size_px: int = 224
    own: Intensity | None = None
    given: Modality = "ct"

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.own.channels if self.own else len(self.mean)

    @property
    def ct_window(self) -> tuple[float, float]:
        """The window that fits the model best where it is given CT."""
        return self.own.shown_range if isinstance(self.own, CTIntensity) else DEFAULT_CT.shown_range

    @property
    def shown_range(self) -> tuple[float, float]:
        """Given values that become black and white."""
        return self.ct_window if self.given == "ct" else (0.0, 1.0)

    def mismatch(self, data: Modality, where: str) -> str:
        """Return what to tell people where a model of ours is given another modality than it was trained on, or ""."""
        return "" if self.own is None else check_modality(self.own.modality, data, where)

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

        A model of CT gets them stretched over its window.
        """
        channels = self.channels
        if unit.shape[1] != channels:
            unit = unit.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if isinstance(self.own, CTIntensity):
            low, high = self.own.shown_range
            return (unit * (high - low) + low - self.own.mean) / self.own.std
        means, stds = (self.own.channel_mean, self.own.channel_std) if self.own else (self.mean, self.std)
        mean = torch.tensor(means, device=unit.device).view(1, -1, 1, 1)
        std = torch.tensor(stds, device=unit.device).view(1, -1, 1, 1)
        return (unit - mean) / std

    def from_ct(
        self, values: Float[Tensor, "batch 1 h w"], window: tuple[float, float] | None = None
    ) -> Float[Tensor, "batch out_channels h w"]:
        """Turn Hounsfield units into model input.

        Args:
            values: One channel, in Hounsfield units.
            window: Lower and upper end of the window; None takes `ct_window`.
        """
        low, high = window or self.ct_window
        return self.from_unit((values.clamp(low, high) - low) / (high - low))
