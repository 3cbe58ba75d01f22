"""Settings of `meddino-eval prompt`. [L] is LVM-Med (arXiv 2306.11925), [S] Segment Anything (arXiv 2304.02643)."""

from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino.core.machine_config import Precision
from meddino_evaluation.segmentation.config import (
    DataConfig,
    EncoderConfig,
    HeadConfig,
    LabelsConfig,
    MetricsConfig,
    SegmentConfig,
    SplitsConfig,
    TrainingConfig,
)

BUNDLE_FILE = "prompts.json"
"""What `meddino-eval predict --box` must know of a finished run, in its folder."""


class PromptsConfig(StrictConfig):
    """What a user would draw, made from the reference mask of each label in each slice."""

    kind: Literal["box", "point", "both"] = "box"
    """A box, points inside, or both."""
    box_margin_px: int = Field(20, ge=0)
    """Each side of the mask's box is moved out by 0 to so many pixels of a picture of 1024 [L]; scaled to other sizes."""
    points: int = Field(1, ge=1, le=20)
    """Points: the first is the deepest inside of the mask, further ones are drawn in it."""
    seed: int = 0
    """Draws margins and points of validation and test: the same for every model and training."""


class DecoderConfig(StrictConfig):
    """SAM's mask decoder and prompt encoder."""

    weights: str | None = None
    """SAM's or MedSAM's own file (.pth, .safetensors), whose prompt encoder and mask decoder are taken; null: random ones."""
    mlp_dim: int = Field(2048, gt=0)
    """Width inside the decoder's transformer; 2048 [S]."""
    layers: int = Field(2, gt=0)
    """Blocks of the decoder's transformer; 2 [S]."""


class PromptTrainingConfig(StrictConfig):
    """How the mask decoder, and a new neck, are trained; image and prompt encoder are held [L]."""

    steps: int = Field(10_000, ge=0)
    """Optimizer steps; 0 tests a file's decoder as it is."""
    batch_size: int = Field(8, gt=0)
    """Masks a step."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW; falls linearly to zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of all gradients together; 1 [L]."""
    dice_weight: float = Field(1.0, ge=0)
    """Weight of each mask's soft Dice loss; 1 [L]."""
    ce_weight: float = Field(1.0, ge=0)
    """Weight of the binary cross-entropy; 1 [L]."""
    map_cache_mib: float = Field(4096, ge=0)
    """Memory for what the frozen image encoder makes of slices, MiB; beyond it slices are encoded again."""
    log_every_steps: int = Field(50, gt=0)
    """Steps between lines of the log."""


class PromptConfig(StrictConfig):
    """`meddino-eval prompt`."""

    data: DataConfig = DataConfig()
    """How volumes become slices; the longer side becomes size_px whatever data.resample says."""
    splits: SplitsConfig = SplitsConfig()
    """Who trains and who is tested."""
    labels: LabelsConfig = LabelsConfig()
    """Which labels are prompted for."""
    size_px: int = Field(1024, gt=0, le=2048)
    """Longer side of a slice as the image encoder sees it, padded to a square; 1024 [L]."""
    random_seed: int = 0
    """Seed of the weights of random:<name>."""
    prompts: PromptsConfig = PromptsConfig()
    """What a user would draw."""
    decoder: DecoderConfig = DecoderConfig()
    """SAM's mask decoder and prompt encoder."""
    training: PromptTrainingConfig = PromptTrainingConfig()
    """How the decoder is trained."""
    metrics: MetricsConfig = MetricsConfig()
    """What is measured."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Each trains a decoder of its own; at least three where a number is reported."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1"."""
    precision: Precision = "auto"
    """"auto" is bf16 on a GPU and fp32 on the CPU."""

    @model_validator(mode="after")
    def _zero_shot_needs_weights(self) -> "PromptConfig":
        if self.training.steps == 0 and self.decoder.weights is None:
            raise ValueError("training.steps=0 tests a file's decoder as it is: set decoder.weights")
        return self

    def as_segmentation(self) -> SegmentConfig:
        """Return the settings that data, splits and results are read by."""
        return SegmentConfig(
            data=self.data.model_copy(update={"resample": "size", "size_px": self.size_px}),
            splits=self.splits,
            labels=self.labels,
            encoder=EncoderConfig(mode="frozen", taps=1, random_seed=self.random_seed),
            head=HeadConfig(name="linear"),
            training=TrainingConfig(crop_px=self.size_px),
            metrics=self.metrics,
            seeds=self.seeds,
            device=self.device,
            precision=self.precision,
        )
