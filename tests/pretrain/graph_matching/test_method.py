"""The method as a whole: it learns, says what it cannot cut, and draws the same on any number of processes."""

import pytest
import torch
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.methods.base import StageSetting
from meddino_pretrain.methods.config import MultiCropConfig
from meddino_pretrain.methods.graph_matching.affinities import MessagePassing, edge_affinity, global_affinity, nearest_nodes
from meddino_pretrain.methods.graph_matching.config import AffinityConfig, GraphConfig, GraphMatchingConfig, MatchingConfig
from meddino_pretrain.methods.graph_matching.method import GraphMatching
from meddino_pretrain.methods.graph_matching.network import GraphTarget, view_pairs
from meddino_pretrain.methods.multi_crop import LARGE, SMALL
from meddino_pretrain.schedules import StepValues
from torch import nn

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.losses.matching import EdgeAffinities, MatchingSetting, matching_loss
from meddino.models.registry import build_backbone

VALUES = StepValues(0.01, 0.0)
SMALL_GRAPHS = GraphConfig(nodes=4, neighbours=2, dim=8)
CROPS = MultiCropConfig(large_px=32, small_px=16)


def test_matching__a_linear_encoder_learns_what_two_views_share():
    """24 of 32 dimensions differ between the views: matching finds the 8 that do not."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder, messages, shares = nn.Linear(32, 128), MessagePassing(128, 2, GraphConfig().message_scale), []
    optimizer = torch.optim.Adam([*encoder.parameters(), *messages.parameters()], lr=2e-3)
    for step in range(150):
        signal = torch.randn(2, 16, 8, generator=rng)
        views = [torch.cat([signal, 1.3 * torch.randn(2, 16, 24, generator=rng)], dim=-1) for _ in range(2)]
        features = [encoder(view) for view in views]
        heads = [nearest_nodes(each, 5) for each in features]
        nodes = [messages(*graph) for graph in zip(features, heads, strict=True)]
        edges = EdgeAffinities(edge_affinity(nodes[0], heads[0], nodes[1], heads[1]), *heads)
        noise = 0.05 * torch.from_numpy(numpy_rng(0, step).gumbel(size=(2, 16, 16))).float()
        loss, share = matching_loss(global_affinity(*nodes), edges, noise, MatchingSetting())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        shares.append(share.mean().item())
    assert sum(shares[:5]) / 5 < 0.3 and sum(shares[-10:]) / 10 > 0.9


def test_message_passing__in_place_of_features_makes_the_nodes_of_a_graph_alike():
    torch.manual_seed(0)
    features = torch.randn(8, 16, 128)
    heads = nearest_nodes(features, 5)

    def alike(scale):
        nodes = MessagePassing(128, 2, scale)(features, heads)
        return ((global_affinity(nodes, nodes).sum((1, 2)) - 16) / (16 * 15)).mean().item()

    assert alike(None) > 0.8 and abs(alike(0.1)) < 0.02


def method_of(config, batch=8, accumulation=1, backbone="vitnano8", **changes):
    setting = StageSetting(4, 7, BatchShare(batch, 0, 1, accumulation), find_machine("cpu"))
    torch.manual_seed(0)
    return GraphMatching.build(config, build_backbone(backbone, **changes), setting)


def batch_of(samples, micro_step=0, slices=8):
    rng = torch.Generator().manual_seed(1)
    views, boxes = {}, {}
    for kind, side in ((LARGE, 32), (SMALL, 16)):
        images = torch.randn(2, slices, 3, side, side, generator=rng)
        box = torch.randint(1, 40, (2, slices, 7), generator=rng, dtype=torch.int32)
        views[kind], boxes[kind] = images[:, samples].flatten(0, 1), box[:, samples].flatten(0, 1)
    return Batch(0, micro_step, views, [str(each) for each in samples], boxes)


CONFIG = GraphMatchingConfig(graph=SMALL_GRAPHS, crops=CROPS)


def gradients_of(method, batches):
    total = {}
    values = VALUES
    for losses in method.losses(batches, values, 3):
        (losses["total"] / len(batches)).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.item() / len(batches)
    return total, {name: each.grad for name, each in method.model.named_parameters() if each.grad is not None}


def test_method__micro_batches_hold_the_same_graphs_as_the_whole_batch():
    # Fresh tokens that see the image: else all images have nearly one feature, and rounding chooses the edges.
    seeing = {"layerscale_init": 1.0}
    whole, gradients = gradients_of(method_of(CONFIG, **seeing), [batch_of(range(8))])
    parts = [batch_of(range(4), 0), batch_of(range(4, 8), 1)]
    cut, gradients_cut = gradients_of(method_of(CONFIG, accumulation=2, **seeing), parts)
    assert cut == pytest.approx(whole, rel=1e-5) and 0 < whole["accuracy"] < 1
    assert whole["hamming"] == pytest.approx(8 * (1 - whole["accuracy"]))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_cut[name], gradient, atol=5e-3 * gradient.abs().max().item(), rtol=0)
    trained = {name for name, each in method_of(CONFIG).model.named_parameters() if each.requires_grad}
    assert gradients.keys() == trained  # or DDP would wait for the others


def test_method__noise_belongs_to_the_graph_whoever_computes_it():
    one, second = method_of(CONFIG), method_of(CONFIG, accumulation=2)
    whole = next(one.targets([batch_of(range(8))], VALUES, 5)).noise
    part = list(second.targets([batch_of(range(4), 0), batch_of(range(4, 8), 1)], VALUES, 5))[1].noise
    assert whole.shape == (5, 2, 4, 4) and torch.equal(whole[:, 1:], part)
    assert not torch.equal(whole, next(one.targets([batch_of(range(8))], VALUES, 6)).noise)


def test_view_pairs__have_a_large_crop_each():
    assert view_pairs([LARGE, LARGE, SMALL, SMALL]) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


@pytest.mark.parametrize("backbone", ["vitnano8", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"affinity": AffinityConfig(edge_weight=0)},
        {"affinity": AffinityConfig(alpha=1)},
        {"matching": MatchingConfig(noise_scale=0)},
        {"graph": GraphConfig(nodes=4, neighbours=2, dim=8, message_layers=0)},
    ],
    ids=["full", "no_second_order", "no_local", "no_noise", "no_message_passing"],
)
def test_method__every_ablation_trains_on_every_kind_of_backbone(backbone, change):
    changes = {"embed_dim": 32, "depth": 1, "num_heads": 2} if backbone == "vitnano8" else {}
    changes = {"embed_dim": 24, "depth": 1, "num_heads": 2} if "tiny" in backbone else changes
    method = method_of(CONFIG.model_copy(update=change), backbone=backbone, **changes)
    terms, gradients = gradients_of(method, [batch_of(range(8))])
    assert terms.keys() == {"hamming", "accuracy", "total"}
    assert gradients["projector.weight"].abs().max() > 0
    assert list(method.trainable()) == ["backbone", "projector"] + ["messages"] * ("graph" not in change)
    target = next(method.targets([batch_of(range(8))], VALUES, 0))
    assert isinstance(target, GraphTarget) and (target.noise is None) == ("matching" in change)


@pytest.mark.parametrize(
    ("batch", "accumulation", "words"),
    [
        (2, 1, "nodes 4: a graph is larger than the batch, global_batch 2"),
        (10, 1, "global_batch 10 .* 2 samples are left over; take 8 or 12"),
        (12, 2, "1 processes x 2 micro-batches gives 6 samples each.*the 3 graphs of a step"),
    ],
)
def test_method__batches_that_hold_no_whole_graphs_are_refused(batch, accumulation, words):
    with pytest.raises(ConfigError, match=words):
        method_of(CONFIG, batch, accumulation)


def test_config__a_node_is_no_neighbour_of_itself():
    with pytest.raises(ValueError, match="neighbours 4 must be below nodes 4"):
        GraphConfig(nodes=4, neighbours=4)
