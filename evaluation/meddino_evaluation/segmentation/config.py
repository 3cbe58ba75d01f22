"""Every setting of `meddino-eval segment`, with its unit and where its default comes from.

[P] is the MedDINOv3 paper (arXiv 2509.02379), [R] its code, [N] nnU-Net; the values are those of shared settings there.
"""

from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino.core.machine_config import Precision
from meddino.data.intensity import Modality

EncoderMode = Literal["frozen", "finetune", "lora", "bitfit", "partial"]
HeadName = Literal["primus", "linear", "unet", "dino_unet", "whole_unet", "whole_transunet", "whole_segformer"]


class DataConfig(StrictConfig):
    """How volumes become slices."""

    channels: Literal["first", "all"] = "first"
    """Image channels that are read; with "all" their number must be the model's."""
    neighbour_slices: int = Field(0, ge=0, le=8)
    """2.5D: this many slices on either side come in as channels; 0 is the paper's 2D [P]."""
    modality: Modality | Literal["auto"] = "auto"
    """What the images' values mean; auto: as the names of the channels say (MR, T1, T2, ...), else ct."""
    intensity: Literal["contract", "fingerprint"] = "contract"
    """Clip and normalise by the model's input contract, or by the training cases' foreground as nnU-Net does for CT [N]."""
    resample: Literal["native", "spacing", "size", "plan"] = "native"
    """In-plane grid: as it is; to spacing_mm; the longer side to size_px; or median spacing x plan_px / crop_px [P]."""
    spacing_mm: float | None = Field(None, gt=0)
    """In-plane spacing, millimetres; needed by resample=spacing."""
    size_px: int | None = Field(None, gt=0, le=2048)
    """Longer in-plane side, pixels; needed by resample=size."""
    plan_px: int = Field(512, gt=0, le=2048)
    """Patch side of nnU-Net's 2D plan, pixels, whose field of view resample=plan keeps; 512 at usual CT sizes [N]."""
    cache: str | None = None
    """Folder in which prepared slices (Blosc2) and a frozen encoder's maps of crops are kept for other runs; null: none."""
    patient_pattern: str | None = None
    """Regular expression; its first group in the case name is the patient. null: patients.csv, else a case is a patient."""

    @model_validator(mode="after")
    def _check_target(self) -> "DataConfig":
        for kind, key in (("spacing", "spacing_mm"), ("size", "size_px")):
            if self.resample == kind and getattr(self, key) is None:
                raise ValueError(f"resample={kind} needs data.{key}")
        return self


class SplitsConfig(StrictConfig):
    """Who trains and who is tested."""

    file: str | None = None
    """A splits_final.json; null: the data set's own if there, else made."""
    folds: int = Field(5, ge=2)
    """Number of folds that are made; 5 [N]."""
    run_folds: tuple[int, ...] = Field((0,), min_length=1)
    """Folds that are run; fold 0 [P]."""
    seed: int = 12345
    """Divides the patients; 12345 gives nnU-Net's own folds [N]."""
    val_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the training patients held out to select on, where something is selected; 80/20 [P]."""


class LabelsConfig(StrictConfig):
    """Which labels are learned and how many training sees; drawn anew for each seed, the same ones for every model."""

    use: tuple[str, ...] = ()
    """Labels that are learned and measured, the others count as background; empty: all."""

    train_cases: int | None = Field(None, gt=0)
    """Patients; null: all."""
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the patients, where train_cases is null."""
    train_slices: int | None = Field(None, gt=0)
    """Labelled slices in all; null: all."""
    slice_choice: Literal["balanced", "random"] = "balanced"
    """Draw them so that each adds the label seen least so far, or evenly."""


class EncoderConfig(StrictConfig):
    """What of the model is read and what of it learns."""

    mode: EncoderMode = "frozen"
    """What of it learns: nothing, everything, low-rank additions (lora), biases (bitfit), or the last blocks (partial)."""
    taps: int = Field(4, ge=1, le=24)
    """Blocks whose patch tokens the head reads, evenly spaced; 4 (2, 5, 8, 11 of 12) [P]; 1 is the single-scale baseline."""
    random_seed: int = 0
    """Seed of the weights of random:<name>."""
    drop_path: float = Field(0.2, ge=0, lt=1)
    """Drop path in fine-tuning of our vision transformers; 0.2 [P]."""
    partial_blocks: int = Field(2, ge=1)
    """Last blocks that learn with mode=partial."""
    lora_rank: int = Field(48, ge=1)
    """Rank of LoRA's additions to qkv, fc1 and fc2; 48 (DINOv2ForRadiology)."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of LoRA's additions; 16 (DINOv2ForRadiology)."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout before LoRA's additions; 0.1 (DINOv2ForRadiology)."""


class HeadConfig(StrictConfig):
    """What turns tokens into classes."""

    name: HeadName = "primus"
    """primus: the paper's decoder [P]; linear: a 1x1 convolution; unet: over the tapped blocks; dino_unet: with an image stem;
    whole_unet, whole_transunet, whole_segformer: networks of their own, with --model none."""


class TrainingConfig(StrictConfig):
    """How the head, and the encoder if asked, are trained."""

    steps: int = Field(250_000, gt=0)
    """Optimizer steps; 1,000 x 250 [P]."""
    batch_size: int = Field(12, gt=0)
    """Crops a step; 12 is nnU-Net's 2D plan for 512 x 512 on a 10 GB card [N]."""
    crop_px: int = Field(896, gt=0, le=2048)
    """Side of a crop and of the sliding window, pixels; 896 [P]."""
    crops: Literal["random", "grid"] = "random"
    """Where crops lie: anywhere, or on the sliding window's own grid (then a frozen encoder sees each crop only once)."""
    lr_head: float = Field(3e-4, gt=0)
    """Learning rate of the head; 3e-4 [P]."""
    lr_encoder: float = Field(3e-5, gt=0)
    """Learning rate of the encoder's own weights; 3e-5 after CT pretraining, 1e-4 from DINOv3, 3e-4 from scratch [P]."""
    lr_adapter: float = Field(1e-3, gt=0)
    """Learning rate of LoRA's matrices and of biases with mode=bitfit, which move little at the encoder's."""
    lr_head_grid: tuple[float, ...] = ()
    """Learning rates of the head that are tried with the first seed; the best by validation Dice is used. Empty: lr_head."""
    weight_decay: float = Field(5e-2, ge=0)
    """AdamW's; 5e-2 [P]."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's; 0.9, 0.98 [P]."""
    clip_norm: float = Field(12.0, gt=0)
    """Largest norm of all gradients together; 12 [P]."""
    map_cache_mib: float = Field(4096, ge=0)
    """Memory for what a frozen encoder makes of crops=grid, MiB; beyond it maps are read from data.cache or computed again."""
    foreground_oversampling: float = Field(0.33, ge=0, le=1)
    """Share of a batch's crops, from its end, that are drawn to hold a label; 0.33 [N]."""
    sampling: Literal["nnunet", "balanced"] = "nnunet"
    """Crops drawn to hold a label: nnunet draws a labelled slice, then a label in it; balanced a label, then a slice."""
    augmentation: Literal["none", "nnunet"] = "none"
    """nnunet: rotation, scaling, mirroring, noise, blur, brightness, contrast, low resolution, gamma, as nnU-Net's [N]."""
    dice_weight: float = Field(1.0, ge=0)
    """Weight of the soft Dice loss; 1 [N]."""
    ce_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy; 1 [N]."""
    selection: Literal["last", "best_val"] = "last"
    """Weights that are tested: the last, or those with the best validation Dice."""
    val_every_steps: int = Field(5_000, gt=0)
    """Steps between validations, where selection=best_val."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one, where selection=best_val; 0: never."""
    save_every_steps: int = Field(0, ge=0)
    """Steps between saves from which the same command goes on after a kill; 0: only finished trainings are kept."""
    log_every_steps: int = Field(50, gt=0)
    """Steps between lines of train.jsonl."""


class InferenceConfig(StrictConfig):
    """How whole volumes are predicted."""

    step: float = Field(0.5, gt=0, le=1)
    """Step of the sliding window, in windows; 0.5 [N]."""
    gaussian: bool = True
    """Weight windows by a Gaussian of an eighth of their side; true [N]."""
    mirror: bool = True
    """Average over mirrored windows (4 forwards instead of 1); true [N]."""
    batch_size: int = Field(8, gt=0)
    """Slices and windows at once; halved by itself where memory runs out."""
    largest_component: Literal["never", "if_val_better", "always"] = "never"
    """Keep only the largest component of each label; if_val_better: of the labels whose validation Dice it raises [N]."""


class MetricsConfig(StrictConfig):
    """What is measured."""

    tolerance_mm: float = Field(1.0, gt=0)
    """Tolerance of the normalised surface Dice, millimetres; 1 [R]."""
    surface: bool = True
    """Also measure surfaces (NSD, HD95, ASSD)."""
    bootstrap: int = Field(2_000, ge=100)
    """Resamples of the patients for 95 % intervals."""


class SegmentConfig(StrictConfig):
    """`meddino-eval segment`."""

    data: DataConfig = DataConfig()
    splits: SplitsConfig = SplitsConfig()
    labels: LabelsConfig = LabelsConfig()
    encoder: EncoderConfig = EncoderConfig()
    head: HeadConfig = HeadConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    metrics: MetricsConfig = MetricsConfig()
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Each trains a head of its own; at least three where a number is reported."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1"."""
    precision: Precision = "auto"
    """"auto" is bf16 on a GPU and fp32 on the CPU."""

    @model_validator(mode="after")
    def _check_selection(self) -> "SegmentConfig":
        if len(set(self.seeds)) != len(self.seeds) or len(set(self.splits.run_folds)) != len(self.splits.run_folds):
            raise ValueError("seeds and splits.run_folds must not repeat")
        selects = self.training.selection == "best_val"
        for key, wants in (
            ("training.lr_head_grid", len(self.training.lr_head_grid) > 0),
            ("training.patience", self.training.patience > 0),
            ("inference.largest_component=if_val_better", self.inference.largest_component == "if_val_better"),
        ):
            if wants and not selects:
                raise ValueError(f"{key} needs validation cases: set training.selection=best_val")
        return self
