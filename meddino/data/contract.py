"""The input contract: how Hounsfield units become the numbers a model was trained on. It travels in every export."""

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig


class InputContract(StrictConfig):
    """How a model wants its input.

    The defaults are those of MedDINOv3's released code: clamp HU to [-1000, 1000], subtract 65.108, divide by 178.017,
    repeat to three channels (where the two numbers come from is published nowhere).
    """

    hu_min: float = -1000.0
    """Lower end of the clip window [HU]; MedDINOv3's code: -1000."""
    hu_max: float = 1000.0
    """Upper end of the clip window [HU]; MedDINOv3's code: 1000."""
    mean: float = 65.108
    """Subtracted after clipping [HU]; MedDINOv3's code: 65.108."""
    std: float = Field(178.017, gt=0)
    """Divisor after that [HU]; MedDINOv3's code: 178.017."""
    channels: int = Field(3, ge=1)
    """The grey image is repeated this often; DINOv3 weights: 3."""

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "InputContract":
        if self.hu_min >= self.hu_max:
            raise ValueError(f"hu_min {self.hu_min} must be below hu_max {self.hu_max}")
        return self
