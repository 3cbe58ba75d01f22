"""A backbone with a projector, and what else its objective needs; `forward` is the whole computation of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.device import at_least_float32
from meddino.models.backbone import Backbone
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.joint_embedding.config import JointEmbeddingConfig
from meddino_pretrain.methods.joint_embedding.objectives import Embeddings, objective_loss
from meddino_pretrain.methods.multi_crop import LARGE, Plans, SeenCrop, cell_centres, see_crops


@dataclass(frozen=True)
class JointTarget:
    """What a micro-batch is trained with.

    Attributes:
        plans: Of drop path.
        seed: Of the directions that lejepa draws.
        teacher: The teacher's embeddings of the large crops.
    """

    plans: Plans
    seed: int
    teacher: Sequence[Float[Tensor, "b d"]]


def mlp(in_dim: int, hidden_dim: int, out_dim: int, hidden_layers: int = 2) -> nn.Sequential:
    """Return linear layers with batch norm and ReLU between, as SimCLR, MoCo v3, Barlow Twins and VICReg have them."""
    widths = [in_dim, *[hidden_dim] * hidden_layers]
    layers: list[nn.Module] = []
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other, bias=False), nn.BatchNorm1d(other), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_dim))


class Embedder(nn.Module):
    """A backbone and a projector, to prototypes where the objective has them; student and teacher are one each."""

    def __init__(self, backbone: Backbone, config: JointEmbeddingConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.embed_dim, config.hidden_dim, config.out_dim)
        clusters = config.objective in ("dino", "swav")
        self.prototypes = nn.Linear(config.out_dim, config.prototypes, bias=False) if clusters else None

    def embed(self, crops: Sequence[SeenCrop]) -> list[Float[Tensor, "b d"]]:
        """Return the embedding of each crop, in float32."""
        found = []
        for crop in crops:
            embedding = at_least_float32(self.projector(crop.cls_token))
            if self.prototypes is not None:
                weight = functional.normalize(at_least_float32(self.prototypes.weight), dim=-1)
                embedding = functional.normalize(embedding, dim=-1) @ weight.T
            found.append(embedding)
        return found


class JointEmbeddingNetwork(Embedder):
    """The student: an embedder with moco_v3's predictor or vicregl's projector of cells."""

    def __init__(self, backbone: Backbone, config: JointEmbeddingConfig, loss: nn.Module) -> None:
        super().__init__(backbone, config)
        self.config, self.loss = config, [loss]  # in a list: its state belongs to the method, not to what is trained
        hidden, out = config.hidden_dim, config.out_dim
        self.predictor = mlp(out, hidden, out, 1) if config.objective == "moco_v3" else None
        self.cells = mlp(backbone.embed_dim, hidden, out) if config.objective == "vicregl" else None

    def forward(self, batch: Batch, target: JointTarget) -> dict[str, Float[Tensor, ""]]:
        """Return the objective's loss."""
        crops = see_crops(self.backbone, batch, target.plans)
        embeddings = self.embed(crops)
        if self.predictor is not None:
            embeddings = [at_least_float32(self.predictor(each)) for each in embeddings]
        cells, places = self._local(crops, batch) if self.cells is not None else ([], [])
        large = sum(crop.kind == LARGE for crop in crops)
        seen = Embeddings(embeddings[:large], embeddings[large:], target.teacher, cells, places)
        device = embeddings[0].device
        with torch.autocast(device.type, enabled=False), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(target.seed)
            total = objective_loss(self.config, self.loss[0], seen)
        return {"loss_of_views": total.detach(), "total": total}

    def _local(self, crops: Sequence[SeenCrop], batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        assert self.cells is not None
        boxes = [part for kind in batch.views for part in batch.boxes[kind].chunk(len(batch.views[kind]) // len(batch.keys))]
        cells, places = [], []
        for crop, box in zip(crops, boxes, strict=True):
            tokens = at_least_float32(self.cells(crop.patch_tokens.flatten(0, 1)))
            cells.append(tokens.view(len(box), *crop.grid, -1))
            places.append(cell_centres(box, crop.grid).to(tokens).view(len(box), *crop.grid, 2))
        return cells, places
