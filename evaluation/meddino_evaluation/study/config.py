"""A study: many backbones, data sets and protocols, as one list of jobs."""

from pathlib import Path

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino_evaluation.adaptation.config import ProtocolName
from meddino_evaluation.classification.config import ClassificationConfig


class StudyData(StrictConfig):
    """One data set of a study."""

    dataset: str
    """Shipped name or YAML file of the data set's definition."""
    root: str
    """Its folder; relative to --data-root if that is given."""
    overrides: tuple[str, ...] = ()
    """key=value on `evaluation`, for this data set alone."""


class StudyConfig(StrictConfig):
    """What a study compares."""

    models: tuple[str, ...] = Field(min_length=1)
    """As --model elsewhere; {model} stands for --model; the first is the reference."""
    data: tuple[StudyData, ...] = Field(min_length=1)
    """Data sets."""
    protocols: tuple[ProtocolName, ...] = ("knn", "logistic", "linear")
    """Study compare: what to run (study freeze and few-shot bring their own)."""
    frozen: ProtocolName = "linear"
    """Study freeze: the protocol with a frozen backbone; S1: a linear head."""
    unfrozen: ProtocolName = "finetune"
    """Study freeze: the protocol that trains it; S1: end to end."""
    metric: str = "auto"
    """Of the plots and of the paired tests; auto: kappa if ordinal, else auroc."""
    features: Path | None = None
    """Folder of the feature cache; null: beside the results."""
    evaluation: ClassificationConfig = ClassificationConfig()
