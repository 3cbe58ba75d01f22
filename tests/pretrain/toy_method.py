"""A method of its own in sixty lines: two views of a slice shall look alike to a small projector, and slices apart."""

from typing import Any, Literal

import torch
from meddino_pretrain.config import PretrainConfig, StageConfig
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.methods import METHODS, MethodRow
from meddino_pretrain.methods.base import Method, StageSetting
from meddino_pretrain.methods.config import MethodConfig, Terms
from torch import Tensor, nn
from torch.nn import functional as F

from meddino.models.backbone import Backbone


class ToyConfig(MethodConfig):
    """Two views that look alike."""

    name: Literal["toy"] = "toy"
    """The method."""
    size_px: int = 32
    """Side of a view [px]."""

    @property
    def terms(self) -> Terms:
        return Terms(losses=("agreement", "spread"))


class ToyNetwork(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, nn.Linear(backbone.embed_dim, 16)

    def forward(self, batch: Any, target: None) -> dict[str, Tensor]:
        seen = self.backbone.tokens(torch.cat([batch.views["one"], batch.views["two"]])).cls_token
        one, two = F.normalize(self.projector(seen).float(), dim=-1).chunk(2)
        agreement, spread = 1 - (one * two).sum(-1).mean(), one.mean(0).square().sum()
        return {"agreement": agreement.detach(), "spread": spread.detach(), "total": agreement + spread}


class Toy(Method):
    def __init__(self, model: ToyNetwork, setting: StageSetting) -> None:
        self.model, self.called, self.machine = model, model, setting.machine

    @classmethod
    def views(cls, config: ToyConfig) -> ViewSpec:
        views = {"one": View(1, (0.3, 1.0)), "two": View(1, (0.3, 1.0))}
        return ViewSpec(views, (ViewSizes({"one": config.size_px, "two": config.size_px}),))

    @classmethod
    def build(cls, config: ToyConfig, backbone: Backbone, setting: StageSetting) -> "Toy":
        return cls(ToyNetwork(backbone), setting)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def export(self) -> Backbone:
        return self.model.backbone


def register() -> None:
    """Give METHODS its row, as a shipped method has one; recipes know it from here on."""
    METHODS["toy"] = MethodRow("tests.pretrain.toy_method:ToyConfig", "tests.pretrain.toy_method:Toy")
    for schema in (StageConfig, PretrainConfig):
        schema.model_rebuild(force=True)
