"""What a recipe says about joint embedding: which objective, views, projector, teacher."""

import math
from typing import Literal

from pydantic import Field

from meddino_pretrain.methods.config import MethodConfig, MultiCropConfig, Terms

Objective = Literal["simclr", "moco_v3", "barlow_twins", "vicreg", "vicregl", "dino", "swav", "lejepa"]


class JointEmbeddingConfig(MethodConfig):
    """Embeddings of views of one image are brought together; losses of `lightly`, over a micro-batch of all processes."""

    name: Literal["joint_embedding"] = "joint_embedding"
    """The method."""
    objective: Objective
    """What keeps the embeddings of different images apart, or from becoming one."""
    crops: MultiCropConfig = MultiCropConfig()
    hidden_dim: int = Field(2048, ge=1)
    """Width of the projector's two hidden layers; SimCLR, DINO: 2048; Barlow Twins, VICReg: 8192."""
    out_dim: int = Field(256, ge=1)
    """Width of the embeddings; MoCo v3: 256; SimCLR: 128; Barlow Twins, VICReg: 8192; LeJEPA: 128."""
    prototypes: int = Field(3000, ge=2)
    """Prototypes of dino and swav; SwAV: 3000; DINO: 65,536."""
    temperature: float = Field(0.1, gt=0)
    """Softmax temperature of simclr, moco_v3, dino and swav; SimCLR, SwAV, DINO: 0.1; MoCo v3: 0.2."""
    teacher_temperature: float = Field(0.04, gt=0)
    """Softmax temperature of dino's teacher; DINO: 0.04."""
    ema_momentum: float = Field(0.99, ge=0, le=1)
    """Momentum of the teacher of dino and moco_v3 at the start, 1 at the end by a cosine; MoCo v3: 0.99; DINO: 0.996."""
    sigreg_weight: float = Field(0.05, gt=0, lt=1)
    """Share of SIGReg in lejepa [0-1]; LeJEPA: 0.05."""

    @property
    def has_teacher(self) -> bool:
        """Whether an EMA teacher makes the targets."""
        return self.objective in ("dino", "moco_v3")

    @property
    def terms(self) -> Terms:
        """See `MethodConfig`."""
        chance = {"loss_of_views": math.log(self.prototypes)} if self.objective in ("dino", "swav") else {}
        return Terms(losses=("loss_of_views",), chance=chance, advice="the objective's temperature or weight")
