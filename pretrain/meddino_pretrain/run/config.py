"""What a recipe says about a run's beginning and what it leaves on disk."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meddino.checkpoints.weights.coverage import LoadingTolerances
from meddino.core.config import StrictConfig

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class SamplingConfig(StrictConfig):
    """How often slices come, relative to what their number gives them. Weights multiply; none named is 1, and 0 leaves out."""

    corpus: dict[str, Weight] = {}
    """Weight of the slices of a corpus, by the name of its folder; ours: none."""
    dataset: dict[str, Weight] = {}
    """Weight of the slices of a data set, by its name in volumes.parquet; ours: none."""
    modality: dict[str, Weight] = {}
    """Weight of the slices of a modality: ct, mr, image; ours: none."""
    balance: Literal["none", "modality", "dataset"] = "none"
    """All modalities, or data sets, come equally often before weights count; LVM-Med: modality."""
    repeat_crop: tuple[Share, Share] | None = None
    """Side of a box that a repeated slice is cut to first [share]: one that its group has shown since each slice of the
    corpus could have come once; LVM-Med: 0.85-0.95; null: none is cut."""

    @property
    def by_kind(self) -> dict[str, dict[str, float]]:
        """Weights by what they are given for: corpus, data set, modality."""
        return {"corpus": self.corpus, "dataset": self.dataset, "modality": self.modality}

    @property
    def zero_weights(self) -> list[str]:
        """What is left out, as keys below corpus.sampling."""
        return [f"{kind}.{name}" for kind, weights in self.by_kind.items() for name, weight in weights.items() if weight == 0]

    @model_validator(mode="after")
    def _repeats_are_known(self) -> "SamplingConfig":
        if self.repeat_crop is not None and self.repeat_crop[0] > self.repeat_crop[1]:
            raise ValueError(f"repeat_crop {list(self.repeat_crop)} must ascend")
        return self


class CorpusConfig(StrictConfig):
    """What may be learnt from."""

    sampling: SamplingConfig = SamplingConfig()
    allow_known_overlap: bool = False
    """Train although an audit found held-out data in the corpus; ours: false."""


class InitConfig(StrictConfig):
    """What the first stage starts from."""

    weights: str
    """scratch; or a file or folder: DINOv3's official file, a MedDINOv3 or DINOv3 trainer's file, a transformers folder,
    timm:<name>@<file>, our export or run; required: must be given."""
    section: str | None = None
    """Network taken from a trainer's file: teacher or student; null: teacher if it has one."""
    heads: Literal["if_there", "fresh"] = "if_there"
    """Whether heads in the file are taken; MedDINOv3's has them."""
    gaps: LoadingTolerances = LoadingTolerances()


class SavingConfig(StrictConfig):
    """What is written while training."""

    every_steps: int = Field(1000, ge=1)
    """Steps between checkpoints; one more at a stage's end; ours: 1000."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints of a stage that stay; ours: 3."""
    keep_every_steps: int = Field(0, ge=0)
    """Checkpoints at multiples of this stay besides; 0: none; ours: 0."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    report: bool = True
    """Keep report.html up to date while training; false for runs of seconds, of which drawing it would take half."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (pip install 'meddino[wandb]')."""
