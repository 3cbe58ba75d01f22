"""LVM-Med's method: the graphs of two views are matched, and each node shall be matched with itself."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.models.backbone import Backbone
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.methods.base import Method, StageSetting
from meddino_pretrain.methods.graph_matching.config import GraphMatchingConfig
from meddino_pretrain.methods.graph_matching.network import GraphMatchingNetwork, GraphTarget, view_pairs
from meddino_pretrain.methods.multi_crop import LARGE, SMALL, drop_path_plans, multi_crop_views, without_masks
from meddino_pretrain.schedules import StepValues


class GraphMatching(Method):
    """See `Method`. A graph is so many neighbouring samples of a step: the same ones on any number of processes."""

    model: GraphMatchingNetwork

    def __init__(self, model: GraphMatchingNetwork, config: GraphMatchingConfig, setting: StageSetting) -> None:
        """Take a finished network."""
        self.model, self.called = model, model
        self.config, self.setting, self.machine = config, setting, setting.machine

    @classmethod
    def views(cls, config: GraphMatchingConfig) -> ViewSpec:
        """See `Method`."""
        return multi_crop_views(config.crops, with_boxes=True)

    @classmethod
    def build(cls, config: GraphMatchingConfig, backbone: Backbone, setting: StageSetting) -> "GraphMatching":
        """See `Method`."""
        check_graphs(config.graph.nodes, setting.share)
        return cls(GraphMatchingNetwork(without_masks(backbone), config), config, setting)

    def networks(self) -> Mapping[str, nn.Module]:
        """See `Method`."""
        return {"model": self.model}

    def trainable(self) -> Mapping[str, nn.Module]:
        """See `Method`: without message passing there is nothing to train in it."""
        return {name: part for name, part in self.model.named_children() if any(True for _ in part.parameters())}

    def export(self) -> Backbone:
        """See `Method`."""
        return self.model.backbone

    def targets(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[GraphTarget]:
        """See `Method`: drop path and noise, functions of the seed, the step and the samples' numbers."""
        return (GraphTarget(drop_path_plans(batch, self.setting, step), self._noise(batch, step)) for batch in batches)

    def _noise(self, batch: Batch, step: int) -> torch.Tensor | None:
        scale, nodes = self.config.matching.noise_scale, self.config.graph.nodes
        if scale == 0:
            return None
        samples = self.setting.share.samples(batch.micro_step)
        crops = self.config.crops
        pairs = len(view_pairs([LARGE] * crops.num_large + [SMALL] * crops.num_small))
        drawn = [
            numpy_rng(self.setting.seed, "gumbel", step, first // nodes).gumbel(size=(pairs, nodes, nodes))
            for first in range(samples.start, samples.stop, nodes)
        ]
        return scale * torch.from_numpy(np.stack(drawn, axis=1)).to(self.machine.device, self.machine.weight_dtype)


def check_graphs(nodes: int, share: BatchShare) -> None:
    """Refuse batches that do not hold whole graphs.

    Raises:
        ConfigError: Says how many samples would be left over, and which batches would do.
    """
    batch, micro_batch = share.global_batch, share.micro_batch
    if nodes > batch:
        raise ConfigError(
            f"method.graph.nodes {nodes}: a graph is larger than the batch, global_batch {batch}; take a batch that is a "
            f"multiple of {nodes}, or smaller graphs"
        )
    if batch % nodes:
        below = batch // nodes * nodes
        raise ConfigError(
            f"method.graph.nodes {nodes}: global_batch {batch} is cut into graphs of {nodes} and {batch % nodes} samples are "
            f"left over; take {below} or {below + nodes}"
        )
    if micro_batch % nodes:
        raise ConfigError(
            f"method.graph.nodes {nodes}: global_batch {batch} over {share.world_size} processes x {share.accumulation} "
            f"micro-batches gives {micro_batch} samples each, which are no whole graphs; the {batch // nodes} graphs of a step "
            "must divide over processes and micro-batches"
        )
