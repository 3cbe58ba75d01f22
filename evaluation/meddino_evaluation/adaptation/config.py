"""Settings of what is learnt on a backbone; defaults are those of S0 (DINOv2ForRadiology) and S1 (the freezing study)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from meddino.core.config import StrictConfig

ProtocolName = Literal["knn", "logistic", "linear", "mlp", "attention", "finetune", "finetune_mlp", "partial", "lora", "bitfit"]


class FeaturesConfig(StrictConfig):
    """How features are computed."""

    image_size_px: int | None = Field(None, gt=0)
    """Side of the square input [px]; null: the model's own size."""
    last_blocks: int = Field(4, ge=1)
    """CLS vectors of so many last blocks are kept; S0: 4."""
    batch_size: int = Field(16, ge=1)
    """Slices at a time; does not change the features."""
    max_slices: int | None = Field(None, ge=1)
    """Evenly spaced slices of a volume; null: every slice, as S0."""
    pooling: Literal["mean", "max"] = "mean"
    """Slices of a volume to one vector; S0: mean."""
    cache: Path | None = None
    """Folder of the feature cache; null: beside the results."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


class KnnConfig(StrictConfig):
    """Weighted nearest neighbours."""

    neighbours: tuple[int, ...] = Field(
        (
            5,
            20,
            50,
            100,
            200,
        ),
        min_length=1,
    )
    """k, best by validation; S0's list."""
    temperature: float = Field(0.07, gt=0)
    """Weight exp(cosine / temperature); DINO and S0: 0.07."""
    smoothing: float = Field(1.0, gt=0)
    """ML-kNN's Laplace smoothing; Zhang and Zhou: 1."""


class LogisticConfig(StrictConfig):
    """Logistic regression by L-BFGS."""

    values: int = Field(45, ge=1)
    """How many values of C; S0: 45."""
    lowest_exponent: float = -6.0
    """Lowest C is 10 to this; S0: -6."""
    highest_exponent: float = 5.0
    """Highest C is 10 to this; S0: 5."""
    max_steps: int = Field(1000, ge=1)
    """L-BFGS iterations."""


class LinearConfig(StrictConfig):
    """Linear heads, all trained in one pass over the features."""

    learning_rates: tuple[float, ...] = Field((1e-3, 5e-3, 1e-2, 5e-2), min_length=1)
    """S0's four."""
    last_blocks: tuple[int, ...] = Field((1, 4), min_length=1)
    """CLS of so many last blocks; S0: 1 and 4."""
    average_pool: tuple[bool, ...] = Field(
        (
            False,
            True,
        ),
        min_length=1,
    )
    """Mean patch token appended; S0: both."""
    epochs: int = Field(10, ge=1)
    """S0: 10."""
    min_steps: int = Field(300, ge=0)
    """Train at least so many steps: ten epochs of 40 images are no training; S0: 0."""
    batch_size: int = Field(128, ge=1)
    """S0: 128."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """S0: sgd; LVM-Med: Adam, which adamw is without weight decay."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD; S0: 0.9."""
    init_std: float = Field(0.01, gt=0)
    """Of the weights; S0: 0.01."""


class MlpConfig(StrictConfig):
    """Heads with one hidden layer, or with attention pooling over slices."""

    learning_rates: tuple[float, ...] = Field((1e-4, 1e-3), min_length=1)
    """AdamW; ours."""
    hidden_dims: tuple[int, ...] = Field((128, 512), min_length=1)
    """Hidden widths tried; ours."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Before the last layer; ours."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW; ours."""
    epochs: int = Field(20, ge=1)
    """Ours."""
    min_steps: int = Field(300, ge=0)
    """Train at least so many steps."""
    batch_size: int = Field(128, ge=1)
    """Ours."""


class FinetuneConfig(StrictConfig):
    """Training through the backbone."""

    epochs: int = Field(20, ge=1)
    """S1: 100."""
    min_steps: int = Field(0, ge=0)
    """Train at least so many steps."""
    batch_size: int = Field(32, ge=1)
    """S1: 32."""
    backbone_lr: float = Field(1e-5, gt=0)
    """Of the backbone, end to end; S0: 1e-5, S1: 1e-4."""
    head_lr: float = Field(1e-3, gt=0)
    """Of the head; S1: 1e-4."""
    hidden_dim: int = Field(512, ge=1)
    """Protocol finetune_mlp: width of its head's hidden layer; ours (LVM-Med's two layers)."""
    adapter_lr: float = Field(1e-3, gt=0)
    """Of LoRA's matrices and BitFit's biases; ours."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW; S1: 0 (Adam)."""
    partial_stages: int = Field(2, ge=1)
    """Protocol partial: so many last blocks or stages learn."""
    lora_rank: int = Field(48, ge=1)
    """S0: 48."""
    lora_alpha: float = Field(16.0, gt=0)
    """S0: 16."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """S0: 0.1."""
    flip: bool = False
    """Mirror half of the training images left to right; test images never."""
    eval_every: int = Field(1, ge=1)
    """Epochs between looks at validation; the best one is kept."""


class FewShotConfig(StrictConfig):
    """Training on few patients."""

    patients_per_class: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=1)
    """S0's list."""
    draws: int = Field(5, ge=1)
    """Draws of patients for each number; S0 had one."""
    fractions: tuple[float, ...] = ()
    """Shares of the training patients instead (S1's subset_ratio); empty: none."""
    protocols: tuple[ProtocolName, ...] = Field(("linear",), min_length=1)
    """Trained afresh for every draw."""
