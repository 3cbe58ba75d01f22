"""Settings of `meddino-eval probe`."""

from typing import Literal

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino.core.machine_config import Precision
from meddino_evaluation.segmentation.config import DataConfig, SplitsConfig


class ProbeConfig(StrictConfig):
    """How patch tokens are probed."""

    data: DataConfig = DataConfig(resample="size", size_px=144)
    """How volumes become slices; the longer side to 144 px (ours: 18 x 18 patches of 8, 9 x 9 of 16)."""
    splits: SplitsConfig = SplitsConfig(val_fraction=0.34)
    """Who is learnt from, who selects, who is tested."""
    train_slices: int = Field(16, gt=0)
    """Labelled slices that are learnt from, each adding the label seen least so far; ours: few labels show most."""
    case_slices: int = Field(8, gt=0)
    """Slices of a validation or test case that are looked at, evenly spaced over those that hold a label; ours: neighbours of a
    slice say little more than it."""
    patches_per_label: int = Field(300, gt=0)
    """Patches of a label that are learnt from; more are thinned out at random; ours: seconds instead of minutes."""
    blocks: tuple[int, ...] = Field((1, 4), min_length=1)
    """Last block alone, and evenly spaced blocks side by side; validation chooses."""
    strengths: tuple[float, ...] = Field((0.001, 0.01, 0.1, 1.0), min_length=1)
    """Inverse regularisation C of the logistic regression; validation chooses."""
    neighbours: tuple[int, ...] = Field((5, 20, 100), min_length=1)
    """Values of k of the nearest neighbours; validation chooses."""
    bootstrap: int = Field(2000, ge=0)
    """Resamples of the patients for 95 % intervals."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Draws of the labelled slices."""
    random_seed: int = Field(0, ge=0)
    """Seed of the weights of random:<name>."""
    batch_size: int = Field(32, gt=0)
    """Slices encoded at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    precision: Precision = "auto"
    """bf16 on a GPU that has it, fp32 on the CPU."""


Readout = Literal["knn", "logistic"]
