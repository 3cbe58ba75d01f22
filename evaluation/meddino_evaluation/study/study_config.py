"""A study: many backbones, data sets and protocols, as one list of jobs."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino_evaluation.classification.config import ClassificationConfig, ProtocolName


class StudyData(StrictConfig):
    """One data set of a study."""

    dataset: Annotated[str, Field(description="shipped name or YAML file of the data set's definition")]
    root: Annotated[str, Field(description="its folder; relative to --data-root if that is given")]
    overrides: Annotated[tuple[str, ...], Field(description="key=value on `evaluation`, for this data set alone")] = ()


class StudyConfig(StrictConfig):
    """What a study compares."""

    models: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="as --model elsewhere; {model} stands for --model; the first is the reference"),
    ]
    data: Annotated[tuple[StudyData, ...], Field(min_length=1, description="data sets")]
    protocols: Annotated[
        tuple[ProtocolName, ...],
        Field(description="study compare: what to run (study freeze and few-shot bring their own)"),
    ] = ("knn", "logistic", "linear")
    frozen: Annotated[
        ProtocolName, Field(description="study freeze: the protocol with a frozen backbone; S1: a linear head")
    ] = "linear"
    unfrozen: Annotated[ProtocolName, Field(description="study freeze: the protocol that trains it; S1: end to end")] = (
        "finetune"
    )
    metric: Annotated[str, Field(description="of the plots and of the paired tests; auto: kappa if ordinal, else auroc")] = (
        "auto"
    )
    features: Annotated[Path | None, Field(description="folder of the feature cache; null: beside the results")] = None
    evaluation: ClassificationConfig = ClassificationConfig()
