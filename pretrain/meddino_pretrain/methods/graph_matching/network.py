"""A backbone with a projection and message passing; its `forward` is the whole computation of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meddino.core.device import at_least_float32
from meddino.losses.matching import EdgeAffinities, MatchingSetting, matching_loss
from meddino.models.backbone import Backbone
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.graph_matching.affinities import (
    MessagePassing,
    edge_affinity,
    global_affinity,
    local_affinity,
    nearest_nodes,
)
from meddino_pretrain.methods.graph_matching.config import AffinityConfig, GraphConfig, GraphMatchingConfig
from meddino_pretrain.methods.multi_crop import LARGE, Plans, SeenCrop, cell_centres, see_crops


@dataclass(frozen=True)
class GraphTarget:
    """What chance decides in one micro-batch.

    Attributes:
        plans: Of drop path.
        noise: Added to the affinities of nodes, of each pair of views and each graph; None for none.
    """

    plans: Plans
    noise: Float[Tensor, "pairs graphs n n"] | None


@dataclass(frozen=True)
class GraphView:
    """The graphs of one view.

    Attributes:
        nodes: Features after message passing.
        heads: Where edges end.
        cells: Vectors of the last map, of each image.
        centres: Where the cells lie in their images.
        best: Pairs of cells that count.
    """

    nodes: Float[Tensor, "g n f"]
    heads: Int[Tensor, "g n k"]
    cells: Float[Tensor, "g n p d"]
    centres: Float[Tensor, "g n p 2"]
    best: int


class GraphMatchingNetwork(nn.Module):
    """See the module."""

    def __init__(self, backbone: Backbone, config: GraphMatchingConfig) -> None:
        super().__init__()
        graph, matching = config.graph, config.matching
        self.graph: GraphConfig = graph
        self.affinity: AffinityConfig = config.affinity
        self.setting = MatchingSetting(matching.step_size, matching.margin, matching.restarts, matching.threads)
        self.backbone = backbone
        self.projector = nn.Linear(backbone.embed_dim, graph.dim)
        self.messages = MessagePassing(graph.dim, graph.message_layers, graph.message_scale)

    def forward(self, batch: Batch, target: GraphTarget) -> dict[str, Float[Tensor, ""]]:
        """Return the Hamming distance of the matchings, the share of nodes matched with themselves, and the total."""
        crops = see_crops(self.backbone, batch, target.plans)
        boxes = [part for kind in batch.views for part in batch.boxes[kind].chunk(batch.shapes[kind][0] // len(batch.keys))]
        with torch.autocast(crops[0].cls_token.device.type, enabled=False):
            views = [self._graphs(crop, box) for crop, box in zip(crops, boxes, strict=True)]
            loss, share = self._match(views, view_pairs([crop.kind for crop in crops]), target.noise)
        return {"hamming": loss.detach(), "accuracy": share, "total": loss}

    def _graphs(self, crop: SeenCrop, boxes: Int[Tensor, "b 7"]) -> GraphView:
        tokens = at_least_float32(crop.patch_tokens)
        cut = (-1, self.graph.nodes)
        cells = tokens.view(*cut, *tokens.shape[1:])
        features = self.projector(cells.mean(dim=2))
        heads = nearest_nodes(features, self.graph.neighbours)
        centres = cell_centres(boxes, crop.grid).to(cells)
        best = self.affinity.best_large if crop.kind == LARGE else self.affinity.best_small
        return GraphView(self.messages(features, heads), heads, cells, centres.view(*cut, *centres.shape[1:]), best)

    def _match(
        self, views: Sequence[GraphView], pairs: Sequence[tuple[int, int]], noise: Tensor | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        couples = [(views[one], views[other]) for one, other in pairs]
        vertex = torch.cat([self._vertex_affinity(one, other) for one, other in couples])
        edges = None
        if self.affinity.edge_weight > 0:
            alike = torch.cat([edge_affinity(one.nodes, one.heads, other.nodes, other.heads) for one, other in couples])
            heads, other_heads = (torch.cat([couple[side].heads for couple in couples]) for side in (0, 1))
            edges = EdgeAffinities(self.affinity.edge_weight * alike, heads, other_heads)
        flat = None if noise is None else noise.flatten(0, 1).to(vertex)
        loss, share = matching_loss(vertex, edges, flat, self.setting)
        return loss.mean(), share.mean()

    def _vertex_affinity(self, one: GraphView, other: GraphView) -> Float[Tensor, "g n n"]:
        alike, alpha = global_affinity(one.nodes, other.nodes), self.affinity.alpha
        if alpha == 1:
            return alike
        best = (one.best, other.best)
        graphs = zip(one.cells, other.cells, one.centres, other.centres, strict=True)
        # One graph at a time: all pairs of cells of a graph are its largest tensor.
        local = torch.stack([local_affinity(*graph, best) for graph in graphs])
        return alpha * alike + (1 - alpha) * local


def view_pairs(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of views that are matched: each two of which one is large."""
    return [pair for pair in combinations(range(len(kinds)), 2) if LARGE in (kinds[pair[0]], kinds[pair[1]])]
