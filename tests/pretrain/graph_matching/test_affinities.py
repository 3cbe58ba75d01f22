"""Graphs and affinities against slow loops from the paper's formulas."""

import itertools

import pytest
import torch
from meddino_pretrain.methods.graph_matching.affinities import (
    MessagePassing,
    edge_affinity,
    global_affinity,
    local_affinity,
    nearest_nodes,
)
from meddino_pretrain.methods.multi_crop import cell_centres
from torch.nn.functional import cosine_similarity

torch.manual_seed(0)
ONE, OTHER = torch.randn(2, 5, 7), torch.randn(2, 5, 7)


def test_nearest_nodes__are_the_nearest_others():
    heads = nearest_nodes(ONE, 2)
    for graph, node in itertools.product(range(2), range(5)):
        others = [other for other in range(5) if other != node]
        others.sort(key=lambda other: (ONE[graph, node] - ONE[graph, other]).norm().item())
        assert heads[graph, node].tolist() == others[:2]


def test_message_passing__is_the_normalised_adjacency_times_features():
    messages, heads = MessagePassing(7, 2), nearest_nodes(ONE, 2)
    for graph in range(2):
        adjacency = torch.eye(5)
        for node in range(5):
            adjacency[node, heads[graph, node]] = 1
        root = torch.diag(adjacency.sum(1) ** -0.5)
        mixed = root @ adjacency @ root
        wanted = mixed @ (mixed @ ONE[graph] @ messages.layers[0].weight.T).relu() @ messages.layers[1].weight.T
        torch.testing.assert_close(messages(ONE, heads)[graph], wanted)
    assert MessagePassing(7, 0)(ONE, heads) is ONE
    added = MessagePassing(7, 2, 0.1)
    added.load_state_dict(messages.state_dict())
    torch.testing.assert_close(added(ONE, heads), ONE + 0.1 * messages(ONE, heads))


def test_affinities__are_cosines_of_nodes_and_of_edges():
    heads, other_heads = nearest_nodes(ONE, 2), nearest_nodes(OTHER, 3)[..., :2]
    vertex, edge = global_affinity(ONE, OTHER), edge_affinity(ONE, heads, OTHER, other_heads)
    for g, i, a in itertools.product(range(2), range(5), range(5)):
        torch.testing.assert_close(vertex[g, i, a], cosine_similarity(ONE[g, i], OTHER[g, a], dim=0))
        for r, q in itertools.product(range(2), range(2)):
            j, b = heads[g, i, r], other_heads[g, a, q]
            wanted = cosine_similarity(ONE[g, i] - ONE[g, j], OTHER[g, a] - OTHER[g, b], dim=0)
            torch.testing.assert_close(edge[g, i, r, a, q], wanted)


def test_edge_affinity__of_nodes_that_are_one_is_nothing():
    same = ONE.clone()
    same[:, 1] = same[:, 0] * (1 + 1e-7)
    same.requires_grad_()
    found = edge_affinity(same, torch.tensor([[1, 0, 0, 0, 0]] * 2)[..., None], OTHER, nearest_nodes(OTHER, 1))
    assert found[:, :2].abs().max() == 0 and found[:, 2:].abs().min() > 0
    found.sum().backward()
    assert same.grad.abs().max() < 100


def test_cell_centres__of_a_flipped_crop_in_a_wide_image():
    #                top left height width flipped rows columns
    boxes = torch.tensor([[10, 20, 40, 80, 0, 100, 200], [10, 20, 40, 80, 1, 100, 200]], dtype=torch.int32)
    straight, flipped = cell_centres(boxes, (2, 4))
    assert straight[0].tolist() == pytest.approx([20 / 200, 30 / 200]) and straight[-1].tolist() == pytest.approx([0.2, 0.45])
    assert flipped[0].tolist() == pytest.approx([0.1, 0.45]) and flipped[3].tolist() == pytest.approx([0.1, 0.15])


def slow_local(one, other, places, other_places, best, other_best):
    def mean_of_best(cells, towards, distance, count):
        found = []
        for p in range(len(cells)):
            nearest = min(range(len(towards)), key=lambda q, p=p: distance(p, q))
            found.append((distance(p, nearest), cosine_similarity(cells[p], towards[nearest], dim=0)))
        found.sort(key=lambda each: each[0])
        return torch.stack([cosine for _, cosine in found[:count]]).mean()

    def directed(cells, at, towards, towards_at, count):
        in_place = mean_of_best(cells, towards, lambda p, q: (at[p] - towards_at[q]).norm().item(), count)
        return in_place + mean_of_best(cells, towards, lambda p, q: (cells[p] - towards[q]).norm().item(), count)

    return directed(one, places, other, other_places, best) + directed(other, other_places, one, places, other_best)


def test_local_affinity__is_the_sum_of_four_means_over_the_best_pairs():
    one, other = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    places, other_places = torch.rand(3, 4, 2), torch.rand(3, 6, 2)
    found = local_affinity(one, other, places, other_places, (3, 2))
    for i, a in itertools.product(range(3), range(3)):
        torch.testing.assert_close(found[i, a], slow_local(one[i], other[a], places[i], other_places[a], 3, 2))
    everything = local_affinity(one, other, places, other_places, (20, 20))
    torch.testing.assert_close(everything[1, 2], slow_local(one[1], other[2], places[1], other_places[2], 4, 6))
    assert local_affinity(one, one, places, places, (4, 4)).diagonal().tolist() == pytest.approx([4, 4, 4])
