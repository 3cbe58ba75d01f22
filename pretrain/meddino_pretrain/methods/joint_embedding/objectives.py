"""What each objective makes of the embeddings of all views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.errors import ConfigError
from meddino.distributed.collectives import all_gather_rows, rank
from meddino_pretrain.methods.joint_embedding.config import JointEmbeddingConfig, Objective


@dataclass(frozen=True)
class Embeddings:
    """Of every slice of a micro-batch.

    Attributes:
        large: Of each large crop.
        small: Of each small crop.
        teacher: The teacher's, of each large crop.
        cells: Of each crop's cells, [B, rows, columns, D]; for vicregl.
        places: Where the cells lie, [B, rows, columns, 2].
    """

    large: Sequence[Float[Tensor, "b d"]]
    small: Sequence[Float[Tensor, "b d"]] = ()
    teacher: Sequence[Float[Tensor, "b d"]] = ()
    cells: Sequence[Float[Tensor, "b _ _ d"]] = ()
    places: Sequence[Float[Tensor, "b _ _ 2"]] = ()


def build_loss(config: JointEmbeddingConfig) -> nn.Module:
    """Return lightly's loss of an objective; it may hold state (the centre of dino), which belongs into checkpoints.

    Raises:
        ConfigError: lightly is not installed.
    """
    try:
        from lightly import loss
    except ImportError as error:
        raise ConfigError(
            f"method joint_embedding takes the loss of {config.objective} from lightly, which is not installed: "
            "pip install 'meddino[ssl]'"
        ) from error
    temperature = config.temperature
    builders: dict[Objective, Callable[[], nn.Module]] = {
        "simclr": lambda: loss.NTXentLoss(temperature, gather_distributed=True),
        "moco_v3": lambda: MoCoV3Loss(temperature),
        "barlow_twins": lambda: loss.BarlowTwinsLoss(gather_distributed=True),
        "vicreg": lambda: loss.VICRegLoss(gather_distributed=True),
        "vicregl": lambda: loss.VICRegLLoss(gather_distributed=True),
        "dino": lambda: loss.DINOLoss(config.prototypes, teacher_temp=config.teacher_temperature, student_temp=temperature),
        "swav": lambda: loss.SwaVLoss(temperature, sinkhorn_gather_distributed=True),
        "lejepa": lambda: loss.LeJEPALoss(config.sigreg_weight, gather_distributed=True),
    }
    return builders[config.objective]()


class MoCoV3Loss(nn.Module):
    """Each prediction shall find the teacher's embedding of another view of its image among those of all images.

        loss(q, k) = 2 temperature mean_i cross_entropy(normalise(q) @ normalise(k).T / temperature, i)

    Source: Chen, Xie and He 2021, algorithm 1; keys of all processes.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, queries: Float[Tensor, "b d"], keys: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        """Return the loss of one pair of views."""
        everyone = all_gather_rows(functional.normalize(keys, dim=-1))
        logits = functional.normalize(queries, dim=-1) @ everyone.T / self.temperature
        own = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
        return 2 * self.temperature * functional.cross_entropy(logits, own)


def objective_loss(config: JointEmbeddingConfig, loss: nn.Module, seen: Embeddings) -> Float[Tensor, ""]:
    """Return the objective's loss.

    Pairwise objectives (simclr, moco_v3, barlow_twins, vicreg) take the mean over all pairs of which one view is large.
    """
    large, small = list(seen.large), list(seen.small)
    match config.objective:
        case "moco_v3":
            views = [*enumerate(large), *((-1, each) for each in small)]
            terms = [loss(view, key) for number, view in views for other, key in enumerate(seen.teacher) if number != other]
            found = torch.stack(terms).mean()
        case "dino":
            found = loss(list(seen.teacher), large + small, teacher_temp=config.teacher_temperature)
        case "swav":
            found = loss(large, small)
        case "lejepa" if small:
            found = loss(local_proj=torch.stack(small), global_proj=torch.stack(large))
        case "lejepa":
            found = _without_small(loss, torch.stack(large))
        case "vicregl":
            features, places, some = list(zip([*large, *small], seen.cells, strict=True)), list(seen.places), len(large)
            found = loss(
                global_view_features=features[:some],
                global_view_grids=places[:some],
                local_view_features=features[some:] or None,
                local_view_grids=places[some:] or None,
            )
        case _:
            pairs = [(one, other) for i, one in enumerate(large) for other in [*large[i + 1 :], *small]]
            found = torch.stack([loss(*pair) for pair in pairs]).mean()
    return found.reshape(())


def _without_small(loss: Any, views: Float[Tensor, "v b d"]) -> Tensor:
    spread = (views.mean(0) - views).square().mean()
    result: Tensor = (1 - loss.lambda_param) * spread + loss.lambda_param * loss.sigreg(views)
    return result
