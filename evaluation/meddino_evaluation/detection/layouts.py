"""Where the boxes of a data set lie: COCO's JSON, VOC's XML, a table, Kvasir-SEG's JSON; as a definition says it."""

from typing import Literal

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino_evaluation.classification.dataset_config import SplitName


class CocoLayout(StrictConfig):
    """COCO's JSON: one file, or one for each part."""

    kind: Literal["coco"] = "coco"
    """This layout."""
    files: dict[str, SplitName | None] = Field(min_length=1)
    """File below the root, and the part it is; null: not split yet."""
    images: str = "."
    """Folder below the root that file_name is below."""


class VocLayout(StrictConfig):
    """PASCAL VOC's XML, one file an image."""

    kind: Literal["voc"] = "voc"
    """This layout."""
    annotations: str = "Annotations"
    """Folder of the XML files."""
    images: str = "JPEGImages"
    """Folder that <filename> is below."""
    lists: dict[str, SplitName] = Field(default_factory=dict)
    """Lists of names without endings (ImageSets/Main/train.txt) and the part each is; empty: not split yet."""


class BoxTableLayout(StrictConfig):
    """Tables with a row a box; a row without a box says that the image has none."""

    kind: Literal["box_table"] = "box_table"
    """This layout."""
    tables: dict[str, SplitName | None] = Field(min_length=1)
    """CSV file below the root, and the part it is; null: as its column split says, or not split yet."""
    image: str = "{image}"
    """Image of a row below its table's folder: {column} and {split} are filled in; `v.nii.gz#12` is slice 12 of a volume."""
    corners: tuple[str, str, str, str] = ("x1", "y1", "x2", "y2")
    """Columns of left, top, right and lower edge, pixels."""
    label: str = "label"
    """Column of the class."""
    patient: str | None = "patient"
    """Column of the patient, if the table has it; null: not known."""
    no_finding: tuple[str, ...] = ()
    """Values of `label` that stand for an image without a box."""
    one_of_readers_iou: float | None = Field(None, gt=0, lt=1)
    """Several people drew boxes: those of a class that overlap more are one, their mean. null: each row is a box."""


class KvasirLayout(StrictConfig):
    """Kvasir-SEG's own JSON of boxes."""

    kind: Literal["kvasir_boxes"] = "kvasir_boxes"
    """This layout."""
    file: str = "kavsir_bboxes.json"
    """Below the root; published under this spelling."""
    image: str = "images/{id}.jpg"
    """Image below the root."""


BoxLayout = CocoLayout | VocLayout | BoxTableLayout | KvasirLayout
