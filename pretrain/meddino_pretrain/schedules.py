"""What changes from step to step in every method: learning rate, weight decay, a backbone that is held still."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    lr_shape: Literal["constant", "cosine", "linear", "halving"] = "constant"
    """Shape of lr after the warm-up; FlexiCT: constant, DINOv2: cosine; LVM-Med: halving, in equal parts down to lr_end."""
    lr_end: float | None = Field(None, ge=0)
    """Learning rate at the stage's end; null where lr_shape is constant."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the start; FlexiCT: 0.04."""
    weight_decay_end: float = Field(0.04, ge=0)
    """Weight decay at the end, by a cosine; FlexiCT: 0.04 (constant), DINOv2: 0.4."""
    freeze_backbone_steps: int = Field(0, ge=0)
    """Steps in which all but the backbone learns; ours: > 0 where the backbone is trained and the heads are not."""
    backbone_lr_multiplier: float = Field(1.0, ge=0, le=1)
    """Factor on the backbone's lr throughout; ours: < 1 where released weights are continued with fresh heads."""

    @model_validator(mode="after")
    def _end_fits(self) -> "ScheduleConfig":
        if (self.lr_shape == "constant") != (self.lr_end is None):
            raise ValueError(f"lr_end must be null where lr_shape is constant and a number elsewhere, not {self.lr_end}")
        if self.lr_shape == "halving" and not 0 < (self.lr_end or 0) <= self.lr:
            raise ValueError(f"lr_end must be above 0 and at most lr {self.lr} where lr_shape is halving, not {self.lr_end}")
        return self


@dataclass(frozen=True)
class StepValues:
    """The values of one step.

    Attributes:
        lr: Learning rate, before the factors of single parameters.
        weight_decay: Weight decay.
        lr_multipliers: Part of a parameter's dotted name ("backbone", ...) -> factor on its learning rate.
        own: The method's own values by name.
    """

    lr: float
    weight_decay: float
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedules:
    """Values as a pure function of the step.

    Attributes:
        config: The stage's schedules.
        steps: Length of the stage.
    """

    config: ScheduleConfig
    steps: int

    def at(
        self, step: int, own: Mapping[str, float] | None = None, lr_multipliers: Mapping[str, float] | None = None
    ) -> StepValues:
        """Return the values of a step, counted from 0 within the stage.

        Args:
            step: The step.
            own: The method's values of it.
            lr_multipliers: The method's factors of it.
        """
        config = self.config
        backbone = config.backbone_lr_multiplier if step >= config.freeze_backbone_steps else 0.0
        return StepValues(
            lr=self._lr(step),
            weight_decay=cosine(config.weight_decay, config.weight_decay_end, step / self.steps),
            lr_multipliers={"backbone": backbone, **(lr_multipliers or {})},
            own=own or {},
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
            return cosine(config.lr, config.lr_end, progress)
        if config.lr_shape == "halving":
            times = round(math.log2(config.lr / config.lr_end))
            return config.lr * 0.5 ** min(times, int(progress * (times + 1)))
        return config.lr + (config.lr_end - config.lr) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Return a value between start and end on half a cosine; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def linear(start: float, end: float, step: int, steps: int) -> float:
    """Return a value that goes from start to end in so many steps and stays there."""
    return end if step >= steps else start + (end - start) * step / steps
