"""What a recipe says about graph matching: views, graphs, affinities, and how the matching is differentiated."""

from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino_pretrain.methods.config import Chart, MethodConfig, MultiCropConfig, Terms


class GraphConfig(StrictConfig):
    """How a batch becomes graphs."""

    nodes: int = Field(16, ge=2)
    """Slices in a graph; micro-batches hold whole graphs; LVM-Med: 16."""
    neighbours: int = Field(5, ge=1)
    """Edges that leave a node, to the nearest ones; LVM-Med: 5."""
    dim: int = Field(128, ge=1)
    """Width of the projection and of message passing; LVM-Med: 128."""
    message_layers: int = Field(2, ge=0)
    """Layers of message passing along the edges; LVM-Med: 2; 0: none, an ablation."""
    message_scale: float | None = Field(0.1, gt=0)
    """Factor on messages added to a node's own features; Rolinek: 0.1; null: in their place, as LVM-Med prints it."""

    @model_validator(mode="after")
    def _neighbours_are_there(self) -> "GraphConfig":
        if self.neighbours >= self.nodes:
            raise ValueError(f"neighbours {self.neighbours} must be below nodes {self.nodes}: a node is no neighbour of itself")
        return self


class AffinityConfig(StrictConfig):
    """What makes nodes and edges of two graphs alike."""

    alpha: float = Field(0.8, ge=0, le=1)
    """Share of whole images in the affinity of nodes, the rest is cells' [0-1]; LVM-Med: 0.8; 1: nothing local, an ablation."""
    edge_weight: float = Field(1.0, ge=0)
    """Weight of edges beside nodes; LVM-Med: 1; 0: no second order, an ablation: matching is a linear assignment."""
    best_large: int = Field(20, ge=1)
    """Best pairs of cells that count, of a large crop's; VICRegL: 20."""
    best_small: int = Field(4, ge=1)
    """Best pairs of cells that count, of a small crop's; VICRegL: 4."""


class MatchingConfig(StrictConfig):
    """How the matching is found and differentiated."""

    step_size: float = Field(80.0, gt=0)
    """Lambda: how far costs move along the loss's gradient; LVM-Med: 80."""
    noise_scale: float = Field(1.0, ge=0)
    """Factor on the Gumbel noise; LVM-Med: 1; its authors' later code: 0.05; 0: none, an ablation."""
    margin: float = Field(0.0, ge=0)
    """Taken off the affinity of each node with itself; LVM-Med: 0; its authors' later code: 1."""
    restarts: int = Field(1, ge=1)
    """Starting points of the search; more find the best matching more often; ours: 1."""
    threads: int = Field(4, ge=1)
    """Worker threads of the search; ours: 4."""


class GraphMatchingConfig(MethodConfig):
    """LVM-Med: graphs of images in two views are matched, nodes and edges together."""

    name: Literal["graph_matching"] = "graph_matching"
    """The method."""
    crops: MultiCropConfig = MultiCropConfig()
    graph: GraphConfig = GraphConfig()
    affinity: AffinityConfig = AffinityConfig()
    matching: MatchingConfig = MatchingConfig()

    @property
    def terms(self) -> Terms:
        """See `MethodConfig`."""
        chance = 2.0 * (self.graph.nodes - 1)  # a random permutation leaves one node in place
        return Terms(
            losses=("hamming",),
            charts=(Chart("nodes matched with themselves", "share", {"accuracy": "all pairs of views"}),),
            chance={"hamming": chance},
            advice="the noise's scale and the margin",
        )
