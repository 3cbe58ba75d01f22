"""Settings of every protocol. Defaults are the published studies' (S0: DINOv2ForRadiology; S1: the freezing study)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from meddino.core.config import StrictConfig

ProtocolName = Literal["knn", "logistic", "linear", "mlp", "attention", "finetune", "partial", "lora", "bitfit"]


class FeaturesConfig(StrictConfig):
    """How features are computed."""

    image_size_px: Annotated[
        int | None, Field(gt=0, description="side of the square input [px]; null: the model's own size")
    ] = None
    last_blocks: Annotated[int, Field(ge=1, description="CLS vectors of so many last blocks are kept; S0: 4")] = 4
    batch_size: Annotated[int, Field(ge=1, description="slices at a time; does not change the features")] = 16
    max_slices: Annotated[int | None, Field(ge=1, description="evenly spaced slices of a volume; null: every slice, as S0")] = (
        None
    )
    pooling: Annotated[Literal["mean", "max"], Field(description="slices of a volume to one vector; S0: mean")] = "mean"
    cache: Annotated[Path | None, Field(description="folder of the feature cache; null: beside the results")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1")] = "auto"


class SplitConfig(StrictConfig):
    """How cases are split where the publishers did not."""

    repeats: Annotated[int, Field(ge=1, description="splits or, with a given split, seeds; PROTOCOLS rule 6: at least 3")] = 3
    val_fraction: Annotated[float, Field(gt=0, lt=1, description="share of the patients for validation; S1: 0.2")] = 0.2
    test_fraction: Annotated[float, Field(gt=0, lt=1, description="share of the patients for the test")] = 0.2
    seed: Annotated[int, Field(ge=0, description="of splits and of training")] = 0
    file: Annotated[Path | None, Field(description="JSON with lists train, val, test of case ids; null: see repeats")] = None
    corpus: Annotated[
        str | None, Field(description="pretraining corpus to compare with, a folder or a URL; null: not compared")
    ] = None
    allow_pretraining_overlap: Annotated[
        bool, Field(description="go on, with a note in every table, where evaluated images are in the pretraining corpus")
    ] = False


class KnnConfig(StrictConfig):
    """Weighted nearest neighbours."""

    neighbours: Annotated[tuple[int, ...], Field(min_length=1, description="k, best by validation; S0's list")] = (
        5,
        20,
        50,
        100,
        200,
    )
    temperature: Annotated[float, Field(gt=0, description="weight exp(cosine / temperature); DINO and S0: 0.07")] = 0.07
    smoothing: Annotated[float, Field(gt=0, description="ML-kNN's Laplace smoothing; Zhang and Zhou: 1")] = 1.0


class LogisticConfig(StrictConfig):
    """Logistic regression by L-BFGS."""

    values: Annotated[int, Field(ge=1, description="how many values of C; S0: 45")] = 45
    lowest_exponent: Annotated[float, Field(description="lowest C is 10 to this; S0: -6")] = -6.0
    highest_exponent: Annotated[float, Field(description="highest C is 10 to this; S0: 5")] = 5.0
    max_steps: Annotated[int, Field(ge=1, description="L-BFGS iterations")] = 1000


class LinearConfig(StrictConfig):
    """Linear heads, all trained in one pass over the features."""

    learning_rates: Annotated[tuple[float, ...], Field(min_length=1, description="S0's four")] = (1e-3, 5e-3, 1e-2, 5e-2)
    last_blocks: Annotated[tuple[int, ...], Field(min_length=1, description="CLS of so many last blocks; S0: 1 and 4")] = (1, 4)
    average_pool: Annotated[tuple[bool, ...], Field(min_length=1, description="mean patch token appended; S0: both")] = (
        False,
        True,
    )
    epochs: Annotated[int, Field(ge=1, description="S0: 10")] = 10
    min_steps: Annotated[
        int, Field(ge=0, description="train at least so many steps: ten epochs of 40 images are no training; S0: 0")
    ] = 300
    batch_size: Annotated[int, Field(ge=1, description="S0: 128")] = 128
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD; S0: 0.9")] = 0.9
    init_std: Annotated[float, Field(gt=0, description="of the weights; S0: 0.01")] = 0.01


class MlpConfig(StrictConfig):
    """Heads with one hidden layer, or with attention pooling over slices."""

    learning_rates: Annotated[tuple[float, ...], Field(min_length=1, description="AdamW; ours")] = (1e-4, 1e-3)
    hidden_dims: Annotated[tuple[int, ...], Field(min_length=1, description="hidden widths tried; ours")] = (128, 512)
    dropout: Annotated[float, Field(ge=0, lt=1, description="before the last layer; ours")] = 0.2
    weight_decay: Annotated[float, Field(ge=0, description="AdamW; ours")] = 1e-2
    epochs: Annotated[int, Field(ge=1, description="ours")] = 20
    min_steps: Annotated[int, Field(ge=0, description="train at least so many steps")] = 300
    batch_size: Annotated[int, Field(ge=1, description="ours")] = 128


class FinetuneConfig(StrictConfig):
    """Training through the backbone."""

    epochs: Annotated[int, Field(ge=1, description="S1: 100")] = 20
    min_steps: Annotated[int, Field(ge=0, description="train at least so many steps")] = 0
    batch_size: Annotated[int, Field(ge=1, description="S1: 32")] = 32
    backbone_lr: Annotated[float, Field(gt=0, description="of the backbone, end to end; S0: 1e-5, S1: 1e-4")] = 1e-5
    head_lr: Annotated[float, Field(gt=0, description="of the head; S1: 1e-4")] = 1e-3
    adapter_lr: Annotated[float, Field(gt=0, description="of LoRA's matrices and BitFit's biases; ours")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="AdamW; S1: 0 (Adam)")] = 0.0
    partial_stages: Annotated[int, Field(ge=1, description="protocol partial: so many last blocks or stages learn")] = 2
    lora_rank: Annotated[int, Field(ge=1, description="S0: 48")] = 48
    lora_alpha: Annotated[float, Field(gt=0, description="S0: 16")] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="S0: 0.1")] = 0.1
    flip: Annotated[bool, Field(description="mirror half of the training images left to right; test images never")] = False
    eval_every: Annotated[int, Field(ge=1, description="epochs between looks at validation; the best one is kept")] = 1


class FewShotConfig(StrictConfig):
    """Training on few patients."""

    patients_per_class: Annotated[tuple[int, ...], Field(min_length=1, description="S0's list")] = (1, 2, 4, 8, 16)
    draws: Annotated[int, Field(ge=1, description="draws of patients for each number; S0 had one")] = 5
    fractions: Annotated[
        tuple[float, ...], Field(description="shares of the training patients instead (S1's subset_ratio); empty: none")
    ] = ()
    protocols: Annotated[tuple[ProtocolName, ...], Field(min_length=1, description="trained afresh for every draw")] = (
        "linear",
    )


class StatisticsConfig(StrictConfig):
    """Selection and intervals."""

    selection: Annotated[
        str, Field(description="metric on validation by which anything is chosen; auto: kappa if ordinal, else auroc")
    ] = "auto"
    resamples: Annotated[int, Field(ge=10, description="bootstrap over patients; S1: 5000")] = 2000
    level: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95


class ClassificationConfig(StrictConfig):
    """Everything that one evaluation of one backbone on one data set needs."""

    protocols: Annotated[tuple[ProtocolName, ...], Field(min_length=1, description="what to run; all see the same splits")] = (
        "knn",
        "logistic",
        "linear",
    )
    features: FeaturesConfig = FeaturesConfig()
    split: SplitConfig = SplitConfig()
    knn: KnnConfig = KnnConfig()
    logistic: LogisticConfig = LogisticConfig()
    linear: LinearConfig = LinearConfig()
    mlp: MlpConfig = MlpConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    few_shot: FewShotConfig = FewShotConfig()
    statistics: StatisticsConfig = StatisticsConfig()
