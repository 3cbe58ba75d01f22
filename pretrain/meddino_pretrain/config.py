"""A pretraining recipe: everything a run depends on besides its corpus."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meddino.checkpoints.weights.coverage import GapsConfig
from meddino.core.config import StrictConfig
from meddino.core.device import TrainingPrecision
from meddino.data.contract import InputContract
from meddino.distributed.parallel import Parallel
from meddino_pretrain.data.augmentations import AugmentConfig
from meddino_pretrain.data.crops import CropsConfig
from meddino_pretrain.data.loader import LoaderConfig
from meddino_pretrain.methods.dinov3.gram_choice import GramChoiceConfig
from meddino_pretrain.methods.dinov3.masking import MaskingConfig
from meddino_pretrain.methods.dinov3.method import DINOv3Config
from meddino_pretrain.monitoring.diagnostics import DiagnosisConfig
from meddino_pretrain.monitoring.feature_metrics import HealthConfig
from meddino_pretrain.run.corpus_audit import CorpusConfig
from meddino_pretrain.schedules import ScheduleConfig


class MachineConfig(StrictConfig):
    """Where it runs. Nothing here changes what is learnt, beyond rounding."""

    device: Annotated[str, Field(description="auto: an accelerator if there is one, else the CPU; or cpu, cuda, cuda:1")]
    precision: Annotated[
        TrainingPrecision,
        Field(description="auto: bf16 on an accelerator that has it, fp32 on the CPU; or fp32, bf16, fp64 (to compare runs)"),
    ]
    parallel: Annotated[
        Parallel, Field(description="auto: DDP where there are several processes; fsdp2 cuts weights over them")
    ]
    activation_checkpointing: Annotated[
        bool, Field(description="recompute blocks in the backward pass: a third slower, far less memory")
    ]
    compile: Annotated[bool, Field(description="torch.compile the blocks: faster after a minute of compiling")]


class BackboneConfig(StrictConfig):
    """The backbone's architecture."""

    name: Annotated[str, Field(description="of the registry: vits16, vitb16, vitl16, vitt16, vitnano8, ...")]
    changes: Annotated[
        dict[str, int | float | bool | str | None],
        Field(description="fields of the architecture that differ from the named one, e.g. drop_path (FlexiCT: 0.2), qkv_bias"),
    ]


class HeadConfig(StrictConfig):
    """One projection head."""

    prototypes: Annotated[int, Field(ge=2, description="outputs; FlexiCT: 65,536")]
    hidden_dim: Annotated[int, Field(ge=1, description="width of the hidden layers; DINOv3: 2048")]
    bottleneck_dim: Annotated[int, Field(ge=1, description="width before the prototypes; FlexiCT: 256")]
    layers: Annotated[int, Field(ge=1, description="linear layers before the prototypes; DINOv3: 3")]


class HeadsConfig(StrictConfig):
    """The heads; DINOv3 trains a separate one for iBOT."""

    dino: HeadConfig
    ibot: HeadConfig


class OptimizerConfig(StrictConfig):
    """AdamW and what surrounds it."""

    betas: Annotated[tuple[float, float], Field(description="of AdamW; DINOv3: 0.9, 0.999")]
    clip_grad_norm: Annotated[
        float, Field(gt=0, description="largest gradient norm of the backbone and of each head; DINOv3: 3.0")
    ]
    layerwise_decay: Annotated[float, Field(gt=0, le=1, description="of lr from block to block towards the input; DINOv3: 0.9")]
    patch_embed_lr_multiplier: Annotated[float, Field(ge=0, description="on the patch embedding's lr besides; DINOv3: 0.2")]
    max_bad_steps: Annotated[
        int,
        Field(
            ge=1,
            description="steps in a row with NaN or infinite loss or gradient, each skipped, before the run stops; ours: 5",
        ),
    ]


class SavingConfig(StrictConfig):
    """What is written while training."""

    every_steps: Annotated[int, Field(ge=1, description="steps between checkpoints; one more at a stage's end")]
    keep_last: Annotated[int, Field(ge=1, description="newest checkpoints of a stage that stay")]
    keep_every_steps: Annotated[int, Field(ge=0, description="checkpoints at multiples of this stay besides; 0: none")]
    tensorboard: Annotated[bool, Field(description="also write TensorBoard events")]
    wandb_project: Annotated[
        str | None, Field(description="also log to this Weights & Biases project (pip install 'meddino[wandb]')")
    ]


class InitConfig(StrictConfig):
    """What the first stage starts from."""

    weights: Annotated[
        str,
        Field(
            description="scratch; or a file or folder: DINOv3's official file, a MedDINOv3 or DINOv3 trainer's file, "
            "a transformers folder, timm:<name>@<file>, our export or run; required: must be given"
        ),
    ]
    section: Annotated[
        str | None, Field(description="network taken from a trainer's file: teacher or student; null: teacher if it has one")
    ]
    heads: Annotated[
        Literal["if_there", "fresh"], Field(description="whether heads in the file are taken; MedDINOv3's has them")
    ]
    gaps: GapsConfig


class GramTeacherConfig(StrictConfig):
    """Which earlier teacher anchors the patch features."""

    stage: Annotated[str, Field(description="stage whose EMA teacher was kept; paper: stage1_pretrain")]
    step: Annotated[
        int | Literal["auto"],
        Field(
            description="step of that stage after which it was kept, paper: 20k-40k of 100k; auto: the best patches, measured"
        ),
    ]
    choice: GramChoiceConfig
    light_multiplier: Annotated[
        float, Field(gt=0, le=1, description="on losses.gram_weight where step is auto and choice says light; ours: 0.25")
    ]


class StageConfig(StrictConfig):
    """One stage, complete."""

    starts_from: Annotated[str | None, Field(description="stage whose last student, teacher and heads it takes; null: `init`")]
    steps: Annotated[int, Field(ge=1, description="optimizer steps")]
    global_batch: Annotated[int, Field(ge=2, description="slices in a step, over all processes and micro-batches")]
    accumulation: Annotated[
        int, Field(ge=1, description="micro-batches a process computes a step in; changes memory, not the result")
    ]
    objective: Annotated[Literal["dinov3"], Field(description="what is learnt")]
    losses: DINOv3Config
    schedule: ScheduleConfig
    crops: CropsConfig
    masking: MaskingConfig
    augment: AugmentConfig
    snapshot_steps: Annotated[
        tuple[int, ...], Field(description="steps after which the EMA teacher's backbone is kept, for gram_teacher.step = auto")
    ]
    gram_teacher: Annotated[GramTeacherConfig | None, Field(description="null where losses.gram_weight is 0")]

    @model_validator(mode="after")
    def _gram_is_consistent(self) -> "StageConfig":
        if (self.losses.gram_weight > 0) != (self.gram_teacher is not None):
            raise ValueError("gram_teacher must be set where losses.gram_weight is above 0, and null where it is 0")
        if (self.crops.sizes[0].gram_px is not None) != (self.gram_teacher is not None):
            raise ValueError("crops.sizes.*.gram_px must be set where there is a gram_teacher, and null where there is none")
        return self


class PretrainConfig(StrictConfig):
    """The whole recipe."""

    seed: Annotated[int, Field(ge=0, description="of everything random")]
    corpus: CorpusConfig = CorpusConfig()  # a default: runs begun before it was a key go on
    init: InitConfig
    machine: MachineConfig
    input_contract: InputContract
    backbone: BackboneConfig
    heads: HeadsConfig
    optimizer: OptimizerConfig
    loader: LoaderConfig
    saving: SavingConfig
    health: HealthConfig
    diagnosis: DiagnosisConfig
    stages: Annotated[dict[str, StageConfig], Field(min_length=1, description="by name; the order follows from starts_from")]

    @model_validator(mode="after")
    def _graph_is_sound(self) -> "PretrainConfig":
        for name, stage in self.stages.items():
            earlier = list(self.stages)[: list(self.stages).index(name)]
            if stage.starts_from is not None and stage.starts_from not in earlier:
                raise ValueError(f"stages.{name}.starts_from '{stage.starts_from}' is no stage before it; before it: {earlier}")
            gram = stage.gram_teacher
            if gram is None:
                continue
            if gram.stage not in earlier:
                raise ValueError(f"stages.{name}.gram_teacher.stage '{gram.stage}' is no stage before it; before it: {earlier}")
            steps = self.stages[gram.stage].steps
            if gram.step != "auto" and gram.step > steps:
                raise ValueError(f"stages.{name}.gram_teacher.step {gram.step} is beyond the {steps} steps of {gram.stage}")
        return self

    def snapshots(self, stage: str) -> frozenset[int]:
        """Return the steps of a stage after which its EMA teacher's backbone is kept for later stages' Gram anchoring.

        Where a later stage chooses by measurement, the stage's end is among them: quality can only have fallen by then.
        """
        steps = set(self.stages[stage].snapshot_steps)
        for later in self.stages.values():
            if later.gram_teacher is not None and later.gram_teacher.stage == stage:
                wanted = later.gram_teacher.step
                steps.add(self.stages[stage].steps if wanted == "auto" else wanted)
        return frozenset(steps)
