"""What changes from step to step: learning rate, weight decay, EMA momentum, teacher temperature, what is held still."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig


class ScheduleConfig(StrictConfig):
    """One stage's schedules. All step counts are within the stage."""

    lr: float = Field(gt=0)
    """Learning rate after warm-up, used as it stands: nothing multiplies it by the batch size. DINOv3's rule sqrt_wrt_1024
    would turn a config value 2e-4 at batch 512 into 5.66e-4."""
    warmup_steps: int = Field(ge=0)
    """Steps over which lr rises linearly from 0; FlexiCT: 30,000 of 100,000."""
    lr_shape: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of lr after the warm-up; FlexiCT: constant, DINOv2: cosine."""
    lr_end: float | None = Field(None, ge=0)
    """Learning rate at the stage's end; null where lr_shape is constant."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the start; FlexiCT: 0.04."""
    weight_decay_end: float = Field(0.04, ge=0)
    """Weight decay at the end, by a cosine; FlexiCT: 0.04 (constant), DINOv2: 0.4."""
    ema_momentum: float = Field(ge=0, le=1)
    """Momentum of the EMA teacher at the start; FlexiCT: 0.994, and 0.999 in Gram and high-res."""
    ema_momentum_end: float = Field(ge=0, le=1)
    """Momentum at the end, by a cosine; FlexiCT: constant, DINOv2: 1.0."""
    teacher_temperature_start: float = Field(0.04, gt=0)
    """Softmax temperature of the targets at step 0; DINOv2, DINOv3: 0.04."""
    teacher_temperature: float = Field(0.07, gt=0)
    """Softmax temperature of the targets after its warm-up; FlexiCT: 0.07."""
    teacher_temperature_warmup_steps: int = Field(ge=0)
    """Steps over which it rises linearly; FlexiCT: 30,000."""
    freeze_last_layer_steps: int = Field(ge=0)
    """Steps in which the prototypes stand still; FlexiCT: 3,000."""
    freeze_backbone_steps: int = Field(0, ge=0)
    """Steps in which only the heads learn; ours: > 0 where the backbone is trained and the heads are not."""
    backbone_lr_multiplier: float = Field(1.0, ge=0, le=1)
    """Factor on the backbone's lr throughout; ours: < 1 where released weights are continued with fresh heads."""

    @model_validator(mode="after")
    def _end_fits(self) -> "ScheduleConfig":
        if (self.lr_shape == "constant") != (self.lr_end is None):
            raise ValueError(f"lr_end must be null where lr_shape is constant and a number elsewhere, not {self.lr_end}")
        return self


@dataclass(frozen=True)
class StepValues:
    """The values of one step."""

    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    last_layer_lr_multiplier: float
    backbone_lr_multiplier: float


@dataclass(frozen=True)
class Schedules:
    """Values as a pure function of the step.

    Attributes:
        config: The stage's schedules.
        steps: Length of the stage.
    """

    config: ScheduleConfig
    steps: int

    def at(self, step: int) -> StepValues:
        """Return the values of a step, counted from 0 within the stage."""
        config = self.config
        return StepValues(
            lr=self._lr(step),
            weight_decay=_cosine(config.weight_decay, config.weight_decay_end, step / self.steps),
            ema_momentum=_cosine(config.ema_momentum, config.ema_momentum_end, step / self.steps),
            teacher_temperature=_linear(
                config.teacher_temperature_start, config.teacher_temperature, step, config.teacher_temperature_warmup_steps
            ),
            last_layer_lr_multiplier=float(step >= config.freeze_last_layer_steps),
            backbone_lr_multiplier=config.backbone_lr_multiplier if step >= config.freeze_backbone_steps else 0.0,
        )

    def _lr(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            # The first step already moves: (step + 1), not step.
            return config.lr * (step + 1) / config.warmup_steps
        if config.lr_end is None:
            return config.lr
        progress = (step - config.warmup_steps) / max(1, self.steps - config.warmup_steps)
        if config.lr_shape == "cosine":
            return _cosine(config.lr, config.lr_end, progress)
        return config.lr + (config.lr_end - config.lr) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _linear(start: float, end: float, step: int, steps: int) -> float:
    return end if step >= steps else start + (end - start) * step / steps
