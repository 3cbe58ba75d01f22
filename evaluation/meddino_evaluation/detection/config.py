"""Every setting of `meddino-eval detect`. [L] is LVM-Med (arXiv 2306.11925), [T] torchvision, [V] ViTDet (Li et al. 2022)."""

from typing import Literal

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino.core.machine_config import Precision
from meddino.data.intensity import Modality
from meddino_evaluation.classification.config import SplitConfig

DetectorName = Literal["faster_rcnn", "retinanet"]
EncoderMode = Literal["frozen", "finetune", "lora", "bitfit", "partial"]


class DataConfig(StrictConfig):
    """How pictures and their boxes are read."""

    image_size_px: int = Field(512, gt=0, le=2048)
    """Side of the square input, pixels; the longer side of a picture is brought to it, the rest is black; 512 [L]."""
    modality: Modality | Literal["auto"] = "auto"
    """What values mean; auto: as the data set's definition or the first file says."""
    window_hu: tuple[float, float] | None = None
    """Window shown of CT, Hounsfield units; null: the data set's, else the model's."""
    classes: tuple[str, ...] = ()
    """Classes that are learned and measured, boxes of the others are left out; empty: all that are declared or occur."""
    patient_pattern: str | None = None
    """Regular expression; its first group in an image's name is the patient. null: the table's or file's own, else none."""


class EncoderConfig(StrictConfig):
    """What of the backbone learns; its batch norms keep their statistics in every mode, as in torchvision's detectors."""

    mode: EncoderMode = "finetune"
    """Nothing (frozen), everything [L], low-rank additions (lora), biases (bitfit), or the last stages (partial)."""
    partial_stages: int = Field(2, ge=1)
    """Last blocks or stages that learn with mode=partial."""
    lora_rank: int = Field(48, ge=1)
    """Rank of LoRA's additions; 48 (DINOv2ForRadiology)."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of LoRA's additions; 16 (DINOv2ForRadiology)."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout before LoRA's additions; 0.1 (DINOv2ForRadiology)."""


class DetectorConfig(StrictConfig):
    """What stands on the backbone."""

    name: DetectorName = "faster_rcnn"
    """faster_rcnn [L], retinanet."""
    pyramid_channels: int = Field(256, gt=0)
    """Width of the feature pyramid; 256 [T, V]."""
    box_head_width: int = Field(1024, gt=0)
    """Width of the two layers after RoI pooling, of Faster R-CNN; 1024 [T]."""
    anchor_strides: float | None = Field(None, gt=0)
    """Side of a level's anchors, in its strides; null: 8 for Faster R-CNN, 4 for RetinaNet [T]."""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """Detections below are dropped; 0.05 [T]."""
    nms_iou: float = Field(0.5, gt=0, le=1)
    """Of two detections of a class that overlap more, the surer stays; 0.5 [T]."""
    detections_per_image: int = Field(100, ge=1, le=100)
    """At most so many are kept; 100 is what COCO's metrics look at."""


class TrainingConfig(StrictConfig):
    """How the detector is trained."""

    epochs: int = Field(40, ge=1)
    """Passes over the training part; 40 [L]."""
    min_steps: int = Field(0, ge=0)
    """Train at least so many steps; 0 [L]."""
    batch_size: int = Field(8, ge=1)
    """Images a step; ours."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of pyramid and heads, AdamW, half a cosine to 0; 1e-4 [L] (Adam)."""
    lr_encoder: float = Field(1e-4, gt=0)
    """Learning rate of what learns of the backbone; 1e-4 [L]."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's; 0 [L] (Adam)."""
    clip_norm: float = Field(10.0, gt=0)
    """Largest norm of all gradients together; ours."""
    flip: bool = True
    """Mirror half of the training images left to right; test images never."""
    val_every_epochs: int = Field(1, ge=1)
    """Epochs between looks at validation; the weights with the best AP50 there are tested."""


class MetricsConfig(StrictConfig):
    """What is measured."""

    froc_iou: float = Field(0.5, gt=0, lt=1)
    """Overlap from which a box counts as found in the FROC; 0.5, the PASCAL VOC rule."""
    froc_rates: tuple[float, ...] = Field((0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)
    """False positives an image at which sensitivity is told; LUNA16's seven."""
    resamples: int = Field(2000, ge=10)
    """Bootstrap over patients."""
    level: float = Field(0.95, gt=0, lt=1)
    """Of the intervals."""


class DetectConfig(StrictConfig):
    """`meddino-eval detect`."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    detector: DetectorConfig = DetectorConfig()
    training: TrainingConfig = TrainingConfig()
    split: SplitConfig = SplitConfig(val_fraction=0.1)
    """70/10/20 [L]."""
    overfit: bool = False
    """Train, select and test on the same images: shows that a detector can learn, and is no result; every table says so."""
    metrics: MetricsConfig = MetricsConfig()
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1"."""
    precision: Precision = "auto"
    """"auto" is bf16 on a GPU and fp32 on the CPU."""
