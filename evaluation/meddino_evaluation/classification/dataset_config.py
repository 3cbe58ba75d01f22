"""What a labelled data set is: where its images and labels lie, how labels are named, who the patient is, how it is split."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig

SplitName = Literal["train", "val", "test"]


class FilesLayout(StrictConfig):
    """Image files whose label stands in their path: class folders, or a mark in the file's name."""

    kind: Annotated[Literal["files"], Field(description="this layout")] = "files"
    pattern: Annotated[str, Field(description="glob of the images below the root")]
    label_regex: Annotated[str, Field(description="its first group, found in the path below the root, is the raw label")]
    patient_regex: Annotated[str | None, Field(description="its first group is the patient; null: not known")] = None
    split_regex: Annotated[str | None, Field(description="its first group is looked up in split_values")] = None
    split_values: Annotated[dict[str, SplitName], Field(description="what split_regex found, to split")] = Field(
        default_factory=dict
    )
    neighbours: Annotated[
        int, Field(ge=1, description="without patients: so many files of a class that follow each other in order stay together")
    ] = 1


class TableLayout(StrictConfig):
    """CSV files with one row an image or volume."""

    kind: Annotated[Literal["table"], Field(description="this layout")] = "table"
    tables: Annotated[tuple[str, ...], Field(min_length=1, description="CSV files below the root (globs allowed)")]
    image: Annotated[
        str,
        Field(
            description="image of a row below its table's folder: {column} is filled in, * searches, #key picks an npz's array"
        ),
    ]
    label_columns: Annotated[
        tuple[str, ...], Field(min_length=1, description="one column, or one for each label (multi-label)")
    ]
    separator: Annotated[str | None, Field(description="multi-label in one column: what stands between labels")] = None
    id_column: Annotated[str | None, Field(description="name of a case; null: the image's path")] = None
    patient_column: Annotated[str | None, Field(description="patient; null: use patient_regex or none")] = None
    patient_regex: Annotated[str | None, Field(description="its first group in the image's path is the patient")] = None
    split_column: Annotated[str | None, Field(description="column that says the split")] = None
    split_values: Annotated[dict[str, SplitName], Field(description="value of split_column to split")] = Field(
        default_factory=dict
    )
    split_lists: Annotated[dict[SplitName, str], Field(description="text files below the root with one case id a line")] = (
        Field(default_factory=dict)
    )
    table_splits: Annotated[dict[str, SplitName], Field(description="table to split, for sets with one table a split")] = Field(
        default_factory=dict
    )


class ArraysLayout(StrictConfig):
    """One npz with arrays of images and labels (MedMNIST's layout)."""

    kind: Annotated[Literal["arrays"], Field(description="this layout")] = "arrays"
    file: Annotated[str, Field(description="the npz below the root")]
    arrays: Annotated[
        tuple["ArrayPair", ...], Field(min_length=1, description="which arrays hold images and labels, and which split that is")
    ]


class ArrayPair(StrictConfig):
    """Images and labels under two names of an npz."""

    images: Annotated[str, Field(description="array [n, h, w] or [n, h, w, 3]")]
    labels: Annotated[str, Field(description="array [n], [n, 1], or [n, labels] for multi-label")]
    split: Annotated[SplitName | None, Field(description="the split that these are; null: not split yet")] = None


class MatlabLayout(StrictConfig):
    """MATLAB 7.3 files with image, label and patient inside (the figshare brain-tumour set)."""

    kind: Annotated[Literal["matlab"], Field(description="this layout")] = "matlab"
    pattern: Annotated[str, Field(description="glob of the files below the root")]
    image: Annotated[str, Field(description="HDF5 path of the image")]
    label: Annotated[str, Field(description="HDF5 path of the label, a number")]
    patient: Annotated[str, Field(description="HDF5 path of the patient's id, characters")]


class SegmentationLayout(StrictConfig):
    """Pairs of image and label map, to be laid out as an nnU-Net raw data set for `meddino-eval segment`."""

    kind: Annotated[Literal["segmentation"], Field(description="this layout")] = "segmentation"
    images: Annotated[str, Field(description="glob of the images below the root; * is the case")]
    labels: Annotated[str, Field(description="path of the label map; * is replaced by the case")]
    channel: Annotated[str, Field(description="name of the channel in dataset.json, e.g. CT")] = "CT"


Layout = Annotated[FilesLayout | TableLayout | ArraysLayout | MatlabLayout | SegmentationLayout, Field(discriminator="kind")]


class DatasetConfig(StrictConfig):
    """A labelled data set."""

    name: Annotated[str, Field(description="short name, used in tables and files")]
    title: Annotated[str, Field(description="what it is")]
    citation: Annotated[str, Field(description="whom to cite")]
    licence: Annotated[str, Field(description="of the data")]
    url: Annotated[str, Field(description="where a user gets it; nothing is downloaded")]
    task: Annotated[Literal["binary", "multiclass", "multilabel", "ordinal", "segmentation"], Field(description="kind of task")]
    classes: Annotated[tuple[str, ...], Field(min_length=1, description="names; for a binary task the second is the positive")]
    labels: Annotated[
        dict[str, str], Field(description="raw label to class name (multi-label columns: raw value to 1, 0 or unknown)")
    ] = Field(default_factory=dict)
    modality: Annotated[
        Literal["ct", "image"], Field(description="ct: values are Hounsfield units; image: brightness, stretched to [0, 1]")
    ] = "image"
    volume: Annotated[bool, Field(description="a case is a stack of slices")] = False
    window_hu: Annotated[
        tuple[float, float] | None, Field(description="HU window shown to every model; null: each model's own")
    ] = None
    split_rule: Annotated[str, Field(description="how the publishers or studies split it, in words")]
    notes: Annotated[str, Field(description="what a reader of the results must know")] = ""
    layout: Annotated[Layout, Field(description="where images and labels lie")]

    @model_validator(mode="after")
    def _classes_fit_the_task(self) -> "DatasetConfig":
        if self.task == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has two classes, found {len(self.classes)}")
        if self.task in ("multiclass", "ordinal") and len(self.classes) < 2:
            raise ValueError(f"task {self.task} needs at least two classes")
        if (self.task == "segmentation") != isinstance(self.layout, SegmentationLayout):
            raise ValueError("task segmentation and layout kind segmentation go together")
        return self
