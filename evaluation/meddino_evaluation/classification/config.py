"""Settings of `meddino-eval knn | linear | few-shot | finetune | retrieve`: splits, statistics, and those of every protocol."""

from pathlib import Path

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino_evaluation.adaptation.config import (
    FeaturesConfig,
    FewShotConfig,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    MlpConfig,
    ProtocolName,
)


class SplitConfig(StrictConfig):
    """How cases are split where the publishers did not."""

    repeats: int = Field(3, ge=1)
    """Splits or, with a given split, seeds; ours: at least 3."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the patients for validation; S1: 0.2."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the patients for the test."""
    seed: int = Field(0, ge=0)
    """Of splits and of training."""
    file: Path | None = None
    """JSON with lists train, val, test of case ids; null: see repeats."""
    corpus: str | None = None
    """Pretraining corpus to compare with, a folder or a URL; null: not compared."""
    allow_pretraining_overlap: bool = False
    """Go on, with a note in every table, where evaluated images are in the pretraining corpus."""


class StatisticsConfig(StrictConfig):
    """Selection and intervals."""

    selection: str = "auto"
    """Metric on validation by which anything is chosen; auto: kappa if ordinal, else auroc."""
    resamples: int = Field(2000, ge=10)
    """Bootstrap over patients; S1: 5000."""
    level: float = Field(0.95, gt=0, lt=1)
    """Of the intervals."""


class ClassificationConfig(StrictConfig):
    """Everything that one evaluation of one backbone on one data set needs."""

    protocols: tuple[ProtocolName, ...] = Field(
        (
            "knn",
            "logistic",
            "linear",
        ),
        min_length=1,
    )
    """What to run; all see the same splits."""
    features: FeaturesConfig = FeaturesConfig()
    split: SplitConfig = SplitConfig()
    knn: KnnConfig = KnnConfig()
    logistic: LogisticConfig = LogisticConfig()
    linear: LinearConfig = LinearConfig()
    mlp: MlpConfig = MlpConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    few_shot: FewShotConfig = FewShotConfig()
    statistics: StatisticsConfig = StatisticsConfig()
