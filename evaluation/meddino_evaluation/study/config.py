"""A study: many backbones, data sets and protocols, as one list of jobs."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
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
    name: str | None = None
    """In tables; null: the data set's own. Needed where one data set comes twice."""


class StudyConfig(StrictConfig):
    """What a study compares."""

    models: tuple[str, ...] = Field(min_length=1)
    """As --model elsewhere; {model} stands for --model; the first is the reference."""
    data: tuple[StudyData, ...] = Field(min_length=1)
    """Data sets."""
    protocols: tuple[ProtocolName, ...] = Field(("knn", "logistic", "linear"), min_length=1)
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


def table_names(config: StudyConfig, datasets: Sequence[str]) -> list[str]:
    """Return what tables call each entry of a study's data; rows, pairs and plots are told apart by it.

    Args:
        config: The study.
        datasets: What the data set of each entry calls itself.

    Raises:
        ConfigError: Two entries have one name.
    """
    names: list[str] = []
    for entry, dataset in zip(config.data, datasets, strict=True):
        name = entry.name or dataset
        if name in names:
            raise ConfigError(
                f"entries {names.index(name) + 1} and {len(names) + 1} of the study's data are both '{name}' in its tables: "
                "give one of them a name of its own, {dataset: ..., name: ...}"
            )
        names.append(name)
    return names
