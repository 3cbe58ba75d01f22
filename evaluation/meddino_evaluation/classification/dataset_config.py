"""What a labelled data set is: where its images and labels lie, how labels are named, who the patient is, how it is split."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino.data.intensity import CTIntensity, Modality

SplitName = Literal["train", "val", "test"]


class FilesLayout(StrictConfig):
    """Image files whose label stands in their path: class folders, or a mark in the file's name."""

    kind: Literal["files"] = "files"
    """This layout."""
    pattern: str
    """Glob of the images below the root."""
    label_regex: str
    """Its first group, found in the path below the root, is the raw label."""
    patient_regex: str | None = None
    """Its first group is the patient; null: not known."""
    split_regex: str | None = None
    """Its first group is looked up in split_values."""
    split_values: dict[str, SplitName] = Field(default_factory=dict)
    """What split_regex found, to split."""
    neighbours: int = Field(1, ge=1)
    """Without patients: so many files of a class that follow each other in order stay together."""


class TableLayout(StrictConfig):
    """CSV files with one row an image or volume."""

    kind: Literal["table"] = "table"
    """This layout."""
    tables: tuple[str, ...] = Field(min_length=1)
    """CSV files below the root (globs allowed)."""
    columns: tuple[str, ...] = ()
    """Names of the columns where the tables have no header; empty: they have one."""
    image: str
    """Image of a row below its table's folder: {column} is filled in, * searches, #key picks an npz's array."""
    label_columns: tuple[str, ...] = Field(min_length=1)
    """One column, or one for each label (multi-label)."""
    separator: str | None = None
    """Multi-label in one column: what stands between labels."""
    id_column: str | None = None
    """Name of a case; null: the image's path."""
    patient_column: str | None = None
    """Patient; null: use patient_regex or none."""
    patient_regex: str | None = None
    """Its first group in the image's path is the patient."""
    split_column: str | None = None
    """Column that says the split."""
    split_values: dict[str, SplitName] = Field(default_factory=dict)
    """Value of split_column to split."""
    split_lists: dict[SplitName, str] = Field(default_factory=dict)
    """Text files below the root with one case id a line."""
    table_splits: dict[str, SplitName] = Field(default_factory=dict)
    """Table to split, for sets with one table a split."""


class ArraysLayout(StrictConfig):
    """One npz with arrays of images and labels (MedMNIST's layout)."""

    kind: Literal["arrays"] = "arrays"
    """This layout."""
    file: str
    """The npz below the root."""
    arrays: tuple["ArrayPair", ...] = Field(min_length=1)
    """Which arrays hold images and labels, and which split that is."""


class ArrayPair(StrictConfig):
    """Images and labels under two names of an npz."""

    images: str
    """Array [n, h, w] or [n, h, w, 3]."""
    labels: str
    """Array [n], [n, 1], or [n, labels] for multi-label."""
    split: SplitName | None = None
    """The split that these are; null: not split yet."""


class MatlabLayout(StrictConfig):
    """MATLAB 7.3 files with image, label and patient inside (the figshare brain-tumour set)."""

    kind: Literal["matlab"] = "matlab"
    """This layout."""
    pattern: str
    """Glob of the files below the root."""
    image: str
    """HDF5 path of the image."""
    label: str
    """HDF5 path of the label, a number."""
    patient: str
    """HDF5 path of the patient's id, characters."""


class SegmentationLayout(StrictConfig):
    """Pairs of image and label map, to be laid out as an nnU-Net raw data set for `meddino-eval segment`."""

    kind: Literal["segmentation"] = "segmentation"
    """This layout."""
    images: str
    """Glob of the images below the root; * is the case."""
    labels: str
    """Path of the label map; * is replaced by the case."""
    channel: str = "CT"
    """Name of the channel in dataset.json, e.g. CT."""


Layout = Annotated[FilesLayout | TableLayout | ArraysLayout | MatlabLayout | SegmentationLayout, Field(discriminator="kind")]


class DatasetConfig(StrictConfig):
    """A labelled data set."""

    name: str
    """Short name, used in tables and files."""
    title: str = ""
    """What it is."""
    citation: str = "not stated"
    """Whom to cite."""
    licence: str = "not stated"
    """Of the data."""
    url: str = ""
    """Where a user gets it; nothing is downloaded."""
    task: Literal["binary", "multiclass", "multilabel", "ordinal", "segmentation"]
    """Kind of task."""
    classes: tuple[str, ...] = Field(min_length=1)
    """Names; for a binary task the second is the positive."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Raw label to class name (multi-label columns: raw value to 1, 0 or unknown)."""
    modality: Modality = "image"
    """ct: values are Hounsfield units; mr: arbitrary units; image: brightness; the last two are stretched to [0, 1]."""
    volume: bool = False
    """A case is a stack of slices."""
    window_hu: tuple[float, float] | None = None
    """HU window shown to every model; null: each model's own."""
    split_rule: str = "drawn by patient"
    """How the publishers or studies split it, in words."""
    notes: str = ""
    """What a reader of the results must know."""
    layout: Layout
    """Where images and labels lie."""

    @property
    def shown_range(self) -> tuple[float, float]:
        """Values [HU] that pictures of a CT data set tell apart: its window, or the one of models that name none."""
        return self.window_hu or CTIntensity().shown_range

    @model_validator(mode="after")
    def _classes_fit_the_task(self) -> "DatasetConfig":
        if self.task == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has two classes, found {len(self.classes)}")
        if self.task in ("multiclass", "ordinal") and len(self.classes) < 2:
            raise ValueError(f"task {self.task} needs at least two classes")
        if (self.task == "segmentation") != isinstance(self.layout, SegmentationLayout):
            raise ValueError("task segmentation and layout kind segmentation go together")
        return self
