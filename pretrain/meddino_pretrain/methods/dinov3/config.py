"""What a recipe says about DINOv3: its terms, heads, masks and Gram teacher."""

from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig

Action = Literal["run", "light", "skip"]


class DINOv3Config(StrictConfig):
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
    leash_weight: float = Field(0.0, ge=0)
    """Weight of staying near the backbone that the stage began with; ours: 0, for none."""
    leash: Literal["l2", "gram"] = "l2"
    """l2: the tokens themselves stay near; gram: only the patches' similarities, as in Gram anchoring."""


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


class HeadsConfig(StrictConfig):
    """The heads; DINOv3 trains a separate one for iBOT."""

    dino: HeadConfig = HeadConfig()
    ibot: HeadConfig = HeadConfig()


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
