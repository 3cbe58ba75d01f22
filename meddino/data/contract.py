"""The input contract: how Hounsfield units become the numbers a model was trained on. It travels in every export."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from meddino.core.config import StrictConfig


class InputContract(StrictConfig):
    """How a model wants its input.

    The defaults are those of MedDINOv3's released code: clamp HU to [-1000, 1000], subtract 65.108, divide by 178.017,
    repeat to three channels (where the two numbers come from is published nowhere).
    """

    hu_min: Annotated[float, Field(description="lower end of the clip window [HU]; MedDINOv3's code: -1000")] = -1000.0
    hu_max: Annotated[float, Field(description="upper end of the clip window [HU]; MedDINOv3's code: 1000")] = 1000.0
    mean: Annotated[float, Field(description="subtracted after clipping [HU]; MedDINOv3's code: 65.108")] = 65.108
    std: Annotated[float, Field(gt=0, description="divisor after that [HU]; MedDINOv3's code: 178.017")] = 178.017
    channels: Annotated[int, Field(ge=1, description="the grey image is repeated this often; DINOv3 weights: 3")] = 3

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "InputContract":
        if self.hu_min >= self.hu_max:
            raise ValueError(f"hu_min {self.hu_min} must be below hu_max {self.hu_max}")
        return self

    def apply(self, hu: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch c h w"]:
        """Turn Hounsfield units into model input: clip, normalise, repeat over a new channel axis."""
        normalised = (hu.float().clamp(self.hu_min, self.hu_max) - self.mean) / self.std
        return normalised.unsqueeze(-3).repeat_interleave(self.channels, dim=-3)


def stretch_window(
    hu: Float[Tensor, "b *rest"], lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], contract: InputContract
) -> Float[Tensor, "b *rest"]:
    """Clip each image to its own HU window and stretch that window over the contract's.

    With `lower, upper` equal to the contract's window this is the contract's own clipping, so random windows in
    training and the fixed window afterwards share one scale.

    Args:
        hu: Hounsfield units, float.
        lower: Lower end of each image's window [HU].
        upper: Upper end of each image's window [HU], above `lower`.
        contract: Gives the range that the window is stretched over.

    Returns:
        Values in [hu_min, hu_max] of the contract, still to be normalised by `InputContract.apply`.
    """
    shape = (-1,) + (1,) * (hu.ndim - 1)
    low, high = lower.view(shape), upper.view(shape)
    unit = (hu.clamp(min=low, max=high) - low) / (high - low)
    return unit * (contract.hu_max - contract.hu_min) + contract.hu_min


def to_uint8_window(hu: torch.Tensor, level: float = 40.0, width: float = 400.0) -> torch.Tensor:
    """Return an 8-bit picture of HU for people to look at (default: the usual soft-tissue window)."""
    unit = (hu.float() - (level - width / 2)) / width
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)
