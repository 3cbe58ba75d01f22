"""The matching of small graphs against every permutation there is."""

import itertools

import numpy as np
import pytest

from meddino.losses.assignment import MatchingProblems, match_graphs, pair_affinities


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def noisy_graphs(seed, graphs, nodes, degree, noise, dim=8):
    """Points and the same points moved, their nearest neighbours, and cosines with Gumbel noise."""
    rng = np.random.default_rng(seed)
    one = rng.normal(size=(graphs, nodes, dim))
    other = one + 0.5 * rng.normal(size=one.shape)

    def heads_of(points):
        distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
        distance[:, range(nodes), range(nodes)] = np.inf
        return np.argsort(distance, axis=-1)[:, :, :degree]

    def edges_of(points, heads):
        ends = np.take_along_axis(points[:, None], heads[..., None], axis=2)
        return unit(points[:, :, None] - ends)

    heads, other_heads = heads_of(one), heads_of(other)
    vertex = np.einsum("bif,baf->bia", unit(one), unit(other)) + noise * rng.gumbel(size=(graphs, nodes, nodes))
    edge = np.einsum("birf,baqf->biraq", edges_of(one, heads), edges_of(other, other_heads))
    return MatchingProblems(vertex, edge, heads, other_heads)


def value_of(problems, graph, permutation):
    total = sum(problems.vertex[graph, i, a] for i, a in enumerate(permutation))
    degree = problems.heads.shape[2]
    for i, a in enumerate(permutation):
        for r, q in itertools.product(range(degree), range(degree)):
            if permutation[problems.heads[graph, i, r]] == problems.other_heads[graph, a, q]:
                total += problems.edge[graph, i, r, a, q]
    return total


@pytest.mark.parametrize(("nodes", "degree"), [(2, 1), (3, 2), (5, 2), (6, 3)])
def test_match_graphs__finds_the_best_of_all_permutations(nodes, degree):
    problems = noisy_graphs(nodes, 12, nodes, degree, noise=1.0)
    found = match_graphs(problems, restarts=8)
    for graph in range(len(problems)):
        best = max(value_of(problems, graph, each) for each in itertools.permutations(range(nodes)))
        assert value_of(problems, graph, found[graph].tolist()) == pytest.approx(best, abs=1e-9)


def test_match_graphs__without_edges_is_the_linear_assignment():
    vertex = np.random.default_rng(0).normal(size=(20, 5, 5))
    found = match_graphs(MatchingProblems(vertex))
    for each, matching in zip(vertex, found, strict=True):
        values = [each[range(5), permutation].sum() for permutation in itertools.permutations(range(5))]
        assert each[range(5), matching].sum() == pytest.approx(max(values))


def test_match_graphs__of_sixteen_nodes_is_no_worse_than_what_made_them():
    problems = noisy_graphs(1, 20, 16, 5, noise=0.1)
    found = match_graphs(problems)
    for graph in range(20):
        assert value_of(problems, graph, found[graph].tolist()) >= value_of(problems, graph, range(16)) - 1e-9
    assert (found == np.arange(16)).mean() > 0.9


def test_match_graphs__does_not_depend_on_threads_or_on_what_lies_beside():
    problems = noisy_graphs(2, 20, 8, 3, noise=1.0)
    together = match_graphs(problems, restarts=2)
    assert np.array_equal(match_graphs(problems, restarts=2, threads=3), together)
    alone = np.concatenate([match_graphs(problems[slice(i, i + 1)], restarts=2) for i in range(20)])
    assert np.array_equal(alone, together)


def test_match_graphs__prefers_no_order_of_the_nodes():
    problems = noisy_graphs(3, 10, 6, 2, noise=0.5)
    order = np.random.default_rng(0).permutation(6)
    place = np.argsort(order)
    shuffled = MatchingProblems(
        problems.vertex[:, :, order], problems.edge[:, :, :, order], problems.heads, place[problems.other_heads[:, order]]
    )
    found, other = match_graphs(problems, restarts=8), match_graphs(shuffled, restarts=8)
    assert np.array_equal(order[other], found)


def test_pair_affinities__hold_each_edge_in_both_orders():
    problems = noisy_graphs(4, 1, 4, 2, noise=0.0)
    matrix = pair_affinities(problems)[0].reshape(4, 4, 4, 4)
    wanted = np.zeros((4, 4, 4, 4))
    for i, r, a, q in itertools.product(range(4), range(2), range(4), range(2)):
        j, b = problems.heads[0, i, r], problems.other_heads[0, a, q]
        wanted[i, a, j, b] += problems.edge[0, i, r, a, q]
        wanted[j, b, i, a] += problems.edge[0, i, r, a, q]
    np.testing.assert_allclose(matrix, wanted)
