"""KoLeo: features spread evenly over the sphere."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from meddino.core.device import loss_dtype


def koleo_loss(
    features: Float[Tensor, "batch dim"],
    eps: float = 1e-8,
    everyone: Float[Tensor, "everyone dim"] | None = None,
    first: int = 0,
) -> Float[Tensor, ""]:
    """Spread features apart: minus the mean log distance to the nearest neighbour.

    Args:
        features: CLS features of one crop, before the head; L2-normalised here, in float64.
        eps: Added to every coordinate's difference and to the distance before the logarithm.
        everyone: Features among which neighbours are looked for, those of `features` included: the gathered ones of
            all processes (`meddino.distributed.collectives.all_gather_with_grad`) or of the whole batch under
            accumulation. Gradients flow to them too. `features` alone if None. The mean over equally large parts is
            then the loss of the whole.
        first: Row of `everyone` at which `features` stand.

    Raises:
        ValueError: If there are fewer than two samples to compare (no neighbour exists).

    Source: Sablayrolles et al. 2018. Differences from DINOv3: a batch of one is refused instead of returning 18.4, and
    of two opposite samples neither is its own neighbour; float64, because fresh backbones give all images nearly one
    feature, and the gradient, one over the distance, multiplies the rounding of float32: after 20 steps from a LayerScale
    of 1e-5 two runs that add in another order lie 0.017 apart with float32 here and 0.00016 with float64.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = functional.normalize(features.double(), dim=-1, eps=eps)
        others = own if everyone is None else functional.normalize(everyone.double(), dim=-1, eps=eps)
        if len(others) < 2 or not 0 <= first <= len(others) - len(own):
            raise ValueError(
                f"KoLeo needs at least two samples, its own among them: {len(own)} samples from row {first} of {len(others)}"
            )
        with torch.no_grad():
            similarity = own @ others.t()
            similarity.diagonal(offset=first).fill_(-torch.inf)
            neighbours = similarity.argmax(dim=1)
        distances = functional.pairwise_distance(own, others[neighbours], p=2, eps=eps)
        loss = -torch.log(distances + eps).mean()
        return loss.to(loss_dtype(features))
