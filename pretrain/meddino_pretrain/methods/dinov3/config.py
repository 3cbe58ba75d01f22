"""What a recipe says about DINOv3: terms, heads, crops, masks, the EMA teacher and the Gram teacher."""

import math
from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino_pretrain.methods.config import Action, Chart, Fraction, KeptBackbone, MethodConfig, Terms, check_ascending

GLOBAL_CROPS = 2


class LossesConfig(StrictConfig):
    """Weights of the terms."""

    dino_weight: float = Field(1.0, ge=0)
    """Weight of both DINO terms; DINOv3: 1."""
    dino_local_multiplier: float = Field(1.0, ge=0)
    """Further factor on the local DINO term; DINOv3: 1, high-res 0.5."""
    ibot_weight: float = Field(1.0, ge=0)
    """Weight of iBOT; DINOv3: 1."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of KoLeo, once for each global crop; paper: 0.1."""
    gram_weight: float = Field(0.0, ge=0)
    """Weight of Gram anchoring; paper: 2 in stages 2 and 3; 0 needs no Gram teacher."""
    gram_negatives: Literal["keep", "remove", "remove_teacher"] = "keep"
    """What becomes of negative similarities of patches; DINOv3: keep."""
    student_temperature: float = Field(0.1, gt=0)
    """Softmax temperature of the student; DINOv3: 0.1."""
    distill_to_init_weight: float = Field(0.0, ge=0)
    """Weight of feature distillation to the backbone that the stage began with; ours: 0, for none."""
    distill_to_init: Literal["l2", "gram"] = "l2"
    """l2: the tokens themselves stay near; gram: only the patches' similarities, as in Gram anchoring."""

    def weights(self, num_local: int) -> dict[str, float]:
        """Return what each term is multiplied by in the total, by its name, in the order in which they are added.

        Args:
            num_local: Local crops of each slice; every pair of a teacher crop and another student crop weighs the same.
        """
        global_pairs, local_pairs = GLOBAL_CROPS * (GLOBAL_CROPS - 1), GLOBAL_CROPS * num_local
        pairs = global_pairs + local_pairs
        return {
            "dino_global": self.dino_weight * global_pairs / pairs,
            "dino_local": self.dino_weight * self.dino_local_multiplier * local_pairs / pairs,
            "ibot": self.ibot_weight,
            "koleo": self.koleo_weight * GLOBAL_CROPS,
            "gram": self.gram_weight,
            "distill_to_init": self.distill_to_init_weight,
        }


class HeadConfig(StrictConfig):
    """One projection head."""

    prototypes: int = Field(65536, ge=2)
    """Prototypes, the outputs; FlexiCT: 65,536."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the hidden layers; DINOv3: 2048."""
    bottleneck_dim: int = Field(256, ge=1)
    """Width before the prototypes; FlexiCT: 256."""
    layers: int = Field(3, ge=1)
    """Linear layers before the prototypes; DINOv3: 3."""
    unit_prototypes: bool = False
    """Prototypes start with length one; ours: true from scratch; DINOv3: false (standard deviation 0.02)."""


class HeadsConfig(StrictConfig):
    """The heads; DINOv3 trains a separate one for iBOT."""

    dino: HeadConfig = HeadConfig()
    ibot: HeadConfig = HeadConfig()


class CropSizes(StrictConfig):
    """The sizes of all crops of a step; a stage of several resolutions has several of these and draws one a step."""

    global_px: int = Field(gt=0)
    """Side of the 2 global crops [px]; paper: 256, stage 3: 512 and 768."""
    local_px: int = Field(gt=0)
    """Side of the local crops [px]; paper: 112, stage 3: 112 to 336."""
    gram_px: int | None = Field(None, gt=0)
    """Side of the Gram teacher's crops [px]; DINOv3: 2 x global_px; null: no Gram teacher."""
    weight: float = Field(1.0, gt=0)
    """Share of the steps that take these sizes, relative to the others; DINOv3: .3 and .05."""


class CropsConfig(StrictConfig):
    """How crops are cut from a slice."""

    sizes: tuple[CropSizes, ...] = Field((CropSizes(global_px=256, local_px=112),), min_length=1)
    """Sizes to draw from, once a step for all ranks; stage 1: one."""
    num_local: int = Field(8, ge=0)
    """Local crops of each slice; paper and DINOv3: 8."""
    global_scale: tuple[Fraction, Fraction] = (0.32, 1.0)
    """Share of the slice's area in a global crop [0-1]; paper: 0.32-1.0."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.32)
    """Share of the slice's area in a local crop [0-1]; paper: 0.05-0.32."""
    aspect_ratio: tuple[float, float] = (0.75, 1.333333333)
    """Width / height of a crop's box, in millimetres; torchvision and DINOv3: 3/4-4/3."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a horizontal flip of each crop [0-1]; DINOv3, FlexiCT: 0.5."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "CropsConfig":
        check_ascending({name: getattr(self, name) for name in ("global_scale", "local_scale", "aspect_ratio")})
        if len({sizes.gram_px is None for sizes in self.sizes}) > 1:
            raise ValueError("gram_px must be set for all sizes or for none")
        return self


class MaskingConfig(StrictConfig):
    """Masking of the student's global crops."""

    probability: float = Field(0.5, ge=0, le=1)
    """Share of the global crops of a step that are masked [0-1]; DINOv3: 0.5."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Share of a masked crop's patches that is masked, spread evenly over the step's crops; DINOv3: 0.1-0.5."""
    min_block: int = Field(4, ge=1)
    """Patches in the smallest block that is drawn; BEiT, DINOv2: 4."""
    block_aspect: float = Field(0.3, gt=0, le=1)
    """Lowest width / height of a block, the highest is 1 / it; BEiT, DINOv2: 0.3."""

    @model_validator(mode="after")
    def _ratio_ascends(self) -> "MaskingConfig":
        low, high = self.ratio
        if not 0 < low <= high <= 1:
            raise ValueError(f"ratio {[low, high]} must ascend within (0, 1]")
        return self


class TeacherConfig(StrictConfig):
    """The EMA teacher and the temperature of its targets."""

    ema_momentum: float = Field(ge=0, le=1)
    """Momentum of the EMA teacher at the start; FlexiCT: 0.994, and 0.999 in Gram and high-res."""
    ema_momentum_end: float = Field(ge=0, le=1)
    """Momentum at the end, by a cosine; FlexiCT: constant, DINOv2: 1.0."""
    temperature_start: float = Field(0.04, gt=0)
    """Softmax temperature of the targets at step 0; DINOv2, DINOv3: 0.04."""
    temperature: float = Field(0.07, gt=0)
    """Softmax temperature of the targets after its warm-up; FlexiCT: 0.07."""
    temperature_warmup_steps: int = Field(ge=0)
    """Steps over which it rises linearly; FlexiCT: 30,000."""


class GramChoiceConfig(StrictConfig):
    """How the Gram teacher is chosen among snapshots of the EMA teacher."""

    slices: int = Field(32, ge=2)
    """Fixed slices that the patch quality is measured on; ours: 32."""
    min_loss: float = Field(0.005, ge=0)
    """Fall of patch consistency from its best that counts as degradation [0-1]; ours: 0.005."""
    min_sure: float = Field(2.0, ge=0)
    """Standard errors over slices that the fall must be besides; ours: 2."""
    if_not_degraded: Action = "run"
    """What a Gram stage does where patch quality never fell: run, light or skip; ours: run."""


class GramTeacherConfig(StrictConfig):
    """Which earlier teacher anchors the patch features."""

    stage: str
    """Stage whose EMA teacher was kept; paper: stage1_pretrain."""
    step: int | Literal["auto"] = "auto"
    """Step of that stage after which it was kept; auto: the one with the best patches, measured; paper: 20k-40k of 100k."""
    choice: GramChoiceConfig = GramChoiceConfig()
    light_multiplier: float = Field(0.25, gt=0, le=1)
    """Factor on losses.gram_weight where step is auto and choice says light; ours: 0.25."""


class DINOv3Config(MethodConfig):
    """DINOv3: DINO between crops, iBOT on masked patches, KoLeo, and Gram anchoring to an earlier teacher."""

    name: Literal["dinov3"] = "dinov3"
    """The method."""
    losses: LossesConfig = LossesConfig()
    heads: HeadsConfig = HeadsConfig()
    crops: CropsConfig = CropsConfig()
    masking: MaskingConfig = MaskingConfig()
    teacher: TeacherConfig
    freeze_last_layer_steps: int = Field(ge=0)
    """Steps in which the prototypes stand still; FlexiCT: 3,000."""
    gram_teacher: GramTeacherConfig | None = None
    """The earlier teacher of Gram anchoring; null where losses.gram_weight is 0."""

    @model_validator(mode="after")
    def _gram_is_consistent(self) -> "DINOv3Config":
        if (self.losses.gram_weight > 0) != (self.gram_teacher is not None):
            raise ValueError("gram_teacher must be set where losses.gram_weight is above 0, and null where it is 0")
        if (self.crops.sizes[0].gram_px is not None) != (self.gram_teacher is not None):
            raise ValueError("crops.sizes.*.gram_px must be set where there is a gram_teacher, and null where there is none")
        return self

    @property
    def terms(self) -> Terms:
        """See `MethodConfig`."""
        ln_k = math.log(self.heads.dino.prototypes)
        return Terms(
            losses=tuple(self.losses.weights(self.crops.num_local)),
            charts=(
                Chart(
                    "entropy of the targets; at ln K they say nothing",
                    "nats",
                    {"teacher_entropy": "entropy"},
                    {"ln K": ln_k},
                ),
                Chart("EMA momentum of the teacher", "ema_momentum", {"ema_momentum": "ema_momentum"}),
                Chart("temperature of the targets", "teacher_temperature", {"teacher_temperature": "teacher_temperature"}),
                Chart(
                    "prototypes in use",
                    "share",
                    {
                        "prototypes_used": "targets of a step",
                        "features/cls_assignments_used": "fixed slices, CLS",
                        "features/patch_assignments_used": "fixed slices, patches",
                    },
                ),
            ),
            chance={"dino_global": ln_k},
            uniform={"teacher_entropy": ln_k},
            advice="KoLeo's weight and the teacher temperature",
        )

    @property
    def kept_backbone(self) -> KeptBackbone | None:
        """See `MethodConfig`: the Gram teacher."""
        gram = self.gram_teacher
        if gram is None:
            return None
        return KeptBackbone(gram.stage, None if gram.step == "auto" else gram.step, gram.choice.slices)

    def after_choice(self, action: Action) -> "MethodConfig | None":
        """See `MethodConfig`."""
        if action == "light" and self.gram_teacher is not None:
            weight = self.losses.gram_weight * self.gram_teacher.light_multiplier
            return self.model_copy(update={"losses": self.losses.model_copy(update={"gram_weight": weight})})
        return super().after_choice(action)
