"""Graphs of images, messages along their edges, and how alike the nodes and edges of two of them are."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

_NO_DIRECTION = 1e-4  # shorter edges, in mean lengths of the graph's nodes, are rounding


def nearest_nodes(features: Float[Tensor, "b n f"], neighbours: int) -> Int[Tensor, "b n k"]:
    """Return for each node the K others that lie nearest (Euclidean): the ends of its edges."""
    distances = torch.cdist(features.detach(), features.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.masked_fill(torch.eye(features.shape[1], dtype=torch.bool, device=features.device), torch.inf)
    return distances.topk(neighbours, largest=False).indices


def nodes_at(features: Float[Tensor, "b n f"], heads: Int[Tensor, "b n k"]) -> Float[Tensor, "b n k f"]:
    """Return the features of the nodes at which edges end."""
    graphs = torch.arange(len(features), device=features.device)[:, None, None]
    return features[graphs, heads]


class MessagePassing(nn.Module):
    """Graph convolutions: each node takes up the mean of itself and its neighbours, through linear layers.

        H = relu(D^-1/2 (A + I) D^-1/2 H W), no relu after the last layer
        z' = z + scale * H, where there is a scale; else z' = H

    Source: Kipf and Welling 2017. The degree counts the loop of a node to itself, as there; LVM-Med prints D without it. A is
    directed and every node has K edges, so D is K + 1 everywhere. The sum is Rolinek et al. 2020 (scale 0.1), from whom
    LVM-Med's matching comes; LVM-Med prints H alone. H alone does not learn: its nodes hold a sixth of themselves after each
    layer, and what neighbours add differs between the views as long as features do. Two views that match by 0.81 without
    messages match by 0.29 through two fresh layers and by no more after 100 steps, while the cosine of different nodes
    rises from 0.03 to 0.87 (`tests/pretrain/graph_matching/test_method.py`).

    Args:
        dim: Width.
        layers: Number of layers; without any, features stay as they are.
        scale: Factor on messages that are added to a node's own features; None: they take their place.
    """

    def __init__(self, dim: int, layers: int, scale: float | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.scale = scale

    def forward(self, features: Float[Tensor, "b n f"], heads: Int[Tensor, "b n k"]) -> Float[Tensor, "b n f"]:
        """Return the nodes' features after all layers."""
        if not self.layers:
            return features
        passed = features
        for number, layer in enumerate(self.layers):
            messages = nodes_at(passed, heads).sum(dim=2)
            passed = layer((passed + messages) / (heads.shape[2] + 1))
            if number < len(self.layers) - 1:
                passed = functional.relu(passed)
        return passed if self.scale is None else features + self.scale * passed


def global_affinity(one: Float[Tensor, "b n f"], other: Float[Tensor, "b n f"]) -> Float[Tensor, "b n n"]:
    """Return the cosine of each node of one graph with each of the other."""
    return functional.normalize(one, dim=-1) @ functional.normalize(other, dim=-1).transpose(1, 2)


def edge_affinity(
    one: Float[Tensor, "b n f"], heads: Int[Tensor, "b n k"], other: Float[Tensor, "b n f"], other_heads: Int[Tensor, "b n k"]
) -> Float[Tensor, "b n k n k"]:
    """Return the cosine of each edge of one graph, as the difference of its nodes, with each edge of the other.

    Nodes with the same neighbours are one after message passing: the edge between them has no direction, only rounding, and
    its cosines are 0 here.
    """
    return torch.einsum("birf,baqf->biraq", _directions(one, heads), _directions(other, other_heads))


def _directions(features: Tensor, heads: Tensor) -> Tensor:
    differences = features[:, :, None] - nodes_at(features, heads)
    shortest = _NO_DIRECTION * features.detach().norm(dim=-1).mean(dim=-1).view(-1, 1, 1, 1)
    has_direction: Tensor = differences.detach().norm(dim=-1, keepdim=True) > shortest
    # Replaced before the division: its gradient, one over the length, would be rounding too.
    safe = torch.where(has_direction, differences, torch.ones_like(differences))
    unit: Tensor = functional.normalize(safe, dim=-1)
    return unit * has_direction


def local_affinity(
    one: Float[Tensor, "n p d"],
    other: Float[Tensor, "n q d"],
    centres: Float[Tensor, "n p 2"],
    other_centres: Float[Tensor, "n q 2"],
    best: tuple[int, int],
) -> Float[Tensor, "n n"]:
    """Return how alike the cells of each image of one graph and each of the other are: a sum of four means of cosines.

    For every cell the nearest one of the other image, first in place, then in features; of these pairs the `best` nearest ones
    count; in both directions.

    Args:
        one: Vectors of the cells of N images.
        other: Of the other view's.
        centres: Where they lie in their images.
        other_centres: Where the others do.
        best: Pairs that count, from the one view and from the other.

    Source: LVM-Med's equations, which print the sum; its pseudo-code differs by a factor. Best pairs: VICRegL (Bardes et al.
    2022).
    """
    nodes = len(one)
    products = (one.flatten(0, 1) @ other.flatten(0, 1).T).view(nodes, one.shape[1], nodes, -1).transpose(1, 2)  # n n p q
    norms, other_norms = one.norm(dim=-1)[:, None, :, None], other.norm(dim=-1)[None, :, None, :]
    cosines = products / (norms * other_norms).clamp_min(1e-8)
    with torch.no_grad():
        in_features = norms.square() + other_norms.square() - 2 * products
        places = torch.cdist(centres.flatten(0, 1), other_centres.flatten(0, 1))
        in_place = places.view(nodes, one.shape[1], nodes, -1).transpose(1, 2)
    total = torch.zeros((), device=one.device, dtype=one.dtype)
    for distances in (in_place, in_features):
        total = total + _mean_of_best(cosines, distances, best[0])
        total = total + _mean_of_best(cosines.transpose(2, 3), distances.transpose(2, 3), best[1])
    return total


def _mean_of_best(cosines: Tensor, distances: Tensor, best: int) -> Tensor:
    nearest, which = distances.min(dim=-1)
    chosen = nearest.topk(min(best, nearest.shape[-1]), dim=-1, largest=False).indices
    return cosines.gather(-1, which[..., None])[..., 0].gather(-1, chosen).mean(dim=-1)
