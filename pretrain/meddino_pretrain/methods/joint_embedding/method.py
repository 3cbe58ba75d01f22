"""Joint embedding: SimCLR, MoCo v3, Barlow Twins, VICReg, VICRegL, DINO, SwAV and LeJEPA under one loop."""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed
from meddino.models.backbone import Backbone
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.methods.base import Method, StageSetting
from meddino_pretrain.methods.ema import update_teacher
from meddino_pretrain.methods.joint_embedding.config import JointEmbeddingConfig
from meddino_pretrain.methods.joint_embedding.network import Embedder, JointEmbeddingNetwork, JointTarget
from meddino_pretrain.methods.joint_embedding.objectives import build_loss
from meddino_pretrain.methods.multi_crop import LARGE, Plans, drop_path_plans, multi_crop_views, see_crops, without_masks
from meddino_pretrain.schedules import StepValues, cosine


class JointEmbedding(Method):
    """See `Method`. The student is exported; with objective dino, its teacher."""

    model: JointEmbeddingNetwork

    def __init__(
        self,
        model: JointEmbeddingNetwork,
        teacher: Embedder | None,
        loss: nn.Module,
        config: JointEmbeddingConfig,
        setting: StageSetting,
    ) -> None:
        """Take finished networks."""
        self.model, self.called, self.teacher, self.loss = model, model, teacher, loss
        self.config, self.setting, self.machine = config, setting, setting.machine
        if teacher is not None:
            teacher.requires_grad_(False)

    @classmethod
    def views(cls, config: JointEmbeddingConfig) -> ViewSpec:
        """See `Method`."""
        return multi_crop_views(config.crops, config.objective == "vicregl", frozen=int(config.has_teacher))

    @classmethod
    def build(cls, config: JointEmbeddingConfig, backbone: Backbone, setting: StageSetting) -> "JointEmbedding":
        """See `Method`."""
        if setting.share.micro_batch < 2:
            raise ConfigError(
                f"method joint_embedding compares the images of a micro-batch: {setting.share.micro_batch} slice in each is "
                "too few, at least 2"
            )
        loss = build_loss(config)
        model = JointEmbeddingNetwork(without_masks(backbone), config, loss)
        teacher = None
        if config.has_teacher:
            teacher = Embedder(copy.deepcopy(backbone), config)
            teacher.load_state_dict({name: value for name, value in model.state_dict().items() if name in teacher.state_dict()})
        return cls(model, teacher, loss, config, setting)

    def networks(self) -> Mapping[str, nn.Module]:
        """See `Method`; the state of the loss is among them."""
        state = {"loss": self.loss} if self.loss.state_dict() else {}
        return {"student": self.model, **({"teacher": self.teacher} if self.teacher is not None else {}), **state}

    def trainable(self) -> Mapping[str, nn.Module]:
        """See `Method`."""
        return dict(self.model.named_children())

    def export(self) -> Backbone:
        """See `Method`."""
        return self.teacher.backbone if self.teacher is not None and self.config.objective == "dino" else self.model.backbone

    def scheduled(self, step: int) -> Mapping[str, float]:
        """See `Method`."""
        if self.teacher is None:
            return {}
        return {"ema_momentum": cosine(self.config.ema_momentum, 1.0, step / self.setting.steps)}

    def targets(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[JointTarget]:
        """See `Method`."""
        seed = derive_seed(self.setting.seed, "directions", step)  # the same on every process
        for batch in batches:
            plans = drop_path_plans(batch, self.setting, step)
            yield JointTarget(plans, seed, self._taught(batch, plans))

    @torch.no_grad()
    def _taught(self, batch: Batch, plans: Plans) -> list[torch.Tensor]:
        if self.teacher is None:
            return []
        self.teacher.train()  # batch norms as the student's
        with self.machine.autocast():
            return self.teacher.embed(see_crops(self.teacher.backbone, batch, plans, (LARGE,)))

    def after_step(self, values: StepValues) -> None:
        """See `Method`."""
        if self.teacher is not None:
            followed = dict(self.model.named_parameters())
            pairs = [(followed[name], parameter) for name, parameter in self.teacher.named_parameters()]
            student, teacher = (nn.ParameterList(side) for side in zip(*pairs, strict=True))
            update_teacher(student, teacher, values.own["ema_momentum"])
