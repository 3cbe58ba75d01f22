"""A task of the field as YAML (`configs/evaluation/tasks/NAME.yaml`): its data, split rule, licence and published numbers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig, load_config, shipped_configs
from meddino.core.errors import ConfigError
from meddino.data.intensity import Modality
from meddino_evaluation.classification.dataset_config import SplitName
from meddino_evaluation.detection.layouts import BoxLayout

TaskKind = Literal["segmentation2d", "segmentation_slices", "detection", "classification", "prompts"]
_FOLDER = "tasks"


class MaskSource(StrictConfig):
    """One kind of mask file of a case, and what its values mean."""

    path: str
    """Below the root; {case} and other fields as the images have them, * for several files that are put together."""
    label: str | None = None
    """Every pixel above `above` is this label; null: values mean what `values` says."""
    above: int = Field(127, ge=0)
    """With `label`: brighter pixels belong to it; 127 for pictures of 0 and 255, JPEG among them. Of a volume: all above 0."""
    values: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Without `label`: label to the values in the file that mean it."""

    @model_validator(mode="after")
    def _one_meaning(self) -> "MaskSource":
        if (self.label is None) != bool(self.values):
            raise ValueError(f"mask {self.path} needs either label or values")
        return self


class LabelMapLayout(StrictConfig):
    """Images and mask files, pictures or volumes, whose paths say case, patient, site and part.

    A path holds fields in braces: `{site}/{case}.nii.gz`. Each field stands for a part of a name without a slash; the same
    field twice is the same text. `{case}` names the case, `{patient}`, `{site}` and `{part}` say what they say; more are free.
    """

    kind: Literal["label_maps"] = "label_maps"
    """This layout."""
    images: dict[str, str] = Field(min_length=1)
    """Channel name to path below the root, with fields; the first finds the cases. One picture in colour: `rgb`."""
    masks: tuple[MaskSource, ...] = Field(min_length=1)
    """Where labels come from; a later one lies over an earlier one."""
    optional_masks: bool = False
    """A case without any mask file is left out with a word; else it is an error."""
    exclude: str | None = None
    """Regular expression: paths in which it is found are no images."""
    part_values: dict[str, SplitName] = Field(default_factory=dict)
    """What {part} holds, to train, val or test."""
    raw_shape: tuple[int, int] | None = None
    """Rows and columns of headerless 16-bit big-endian images (JSRT's .IMG); null: files say it themselves."""
    shrink: int = Field(1, ge=1)
    """Image pixels to a mask pixel, along each side; images are averaged down to the masks' grid."""


class OfTask(StrictConfig):
    """The data of another task, evaluated in another way."""

    kind: Literal["of"] = "of"
    """This layout."""
    task: str
    """Its name."""


class LabelledLayout(StrictConfig):
    """Images with classes, as a definition of `meddino-eval datasets` has them."""

    kind: Literal["labelled"] = "labelled"
    """This layout."""
    dataset: str
    """Name of the shipped definition, or its YAML file."""


Layout = Annotated[LabelMapLayout | OfTask | BoxLayout | LabelledLayout, Field(discriminator="kind")]


class PublishedNumber(StrictConfig):
    """A number somebody printed; it stands beside ours and is marked as published."""

    model: str
    """Which model, in the source's words."""
    metric: str
    """dice, iou, ap50, accuracy, ..."""
    value: float
    """As printed, percent."""
    setting: str = ""
    """What else must be the same: a site, frozen or fine-tuned, ..."""
    source: str
    """Paper and table."""


class TaskDefinition(StrictConfig):
    """A task of the field."""

    name: str
    """Short name, as the file's."""
    title: str
    """What it is."""
    kind: TaskKind
    """How it is evaluated."""
    citation: str
    """Whom to cite."""
    licence: str
    """Of the data."""
    where: str
    """Where a user gets the data; nothing is downloaded."""
    folder: str = ""
    """Where the data lie below the root of a study; empty: below the task's name."""
    split_rule: str
    """How publishers or studies split it, and how it is split here, in words."""
    modality: Modality = "image"
    """What the values mean."""
    labels: tuple[str, ...] = ()
    """Names, in the order of their values 1, 2, ...; empty where the layout's own definition names them."""
    train_sites: tuple[str, ...] = ()
    """Sites that are trained on; each other site is a test set of its own (out of distribution). Empty: none is special."""
    layout: Layout
    """Where the files lie."""
    metric: str = "dice"
    """What stands in tables of several tasks: a key of the results' means."""
    overrides: tuple[str, ...] = ()
    """Settings of the task, `key=value` of its command's config, before those of the user."""
    published: tuple[PublishedNumber, ...] = ()
    """What others printed on it."""
    notes: str = ""
    """What a reader of the results must know."""

    @model_validator(mode="after")
    def _layout_fits_kind(self) -> "TaskDefinition":
        for kind, layout in (("detection", BoxLayout), ("classification", LabelledLayout)):
            if (self.kind == kind) != isinstance(self.layout, layout):
                raise ValueError(f"kind {self.kind} and layout {self.layout.kind} do not go together")
        return self

    @model_validator(mode="after")
    def _masks_name_labels(self) -> "TaskDefinition":
        if isinstance(self.layout, LabelMapLayout):
            named = {one for mask in self.layout.masks for one in ([mask.label] if mask.label else mask.values)}
            if named != set(self.labels):
                raise ValueError(f"labels are {list(self.labels)}, the masks of the layout name {sorted(map(str, named))}")
        return self


def load_task(source: str | Path) -> TaskDefinition:
    """Read a definition.

    Args:
        source: Name of a shipped task, or a YAML file.

    Raises:
        ConfigError: There is none, or it is wrong; every wrong key is named.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = shipped_configs() / "evaluation" / _FOLDER / f"{source}.yaml"
        if not path.is_file():
            raise ConfigError(f"no task '{source}'; shipped: {', '.join(task_names())}; or give a YAML file")
    return load_config(TaskDefinition, [path])


def task_names() -> tuple[str, ...]:
    """Return the names of the shipped tasks."""
    return tuple(sorted(path.stem for path in (shipped_configs() / "evaluation" / _FOLDER).glob("*.yaml")))
