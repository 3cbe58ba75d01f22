"""The loss of a matching and its implicit gradient, against formulas, enumeration and finite differences."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from meddino.losses.assignment import match_graphs
from meddino.losses.matching import EdgeAffinities, MatchingSetting, identity_is_certain, matching_loss
from tests.losses.test_assignment import noisy_graphs


def as_tensors(problems):
    edges = EdgeAffinities(*(torch.from_numpy(part) for part in (problems.edge, problems.heads, problems.other_heads)))
    return torch.from_numpy(problems.vertex).requires_grad_(), edges


def test_matching_loss__is_the_hamming_distance():
    vertex = torch.eye(3)[None].repeat(3, 1, 1)
    vertex[1] = vertex[1][[1, 0, 2]]
    vertex[2] = vertex[2][[1, 2, 0]]
    loss, share = matching_loss(vertex, None, None, MatchingSetting())
    assert loss.tolist() == [0, 4, 6] and share.tolist() == pytest.approx([1, 1 / 3, 0])


def test_matching_loss__the_margin_is_taken_off_the_diagonal():
    vertex = torch.eye(4)[None]
    assert matching_loss(vertex, None, None, MatchingSetting(margin=0.9))[0] == 0
    assert matching_loss(vertex, None, None, MatchingSetting(margin=1.1))[0] > 0


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
def test_matching_loss__at_the_papers_step_the_second_matching_is_the_identity(scale):
    problems = noisy_graphs(0, 40, 16, 5, noise=scale)
    assert identity_is_certain(problems, 80.0).all()
    moved = problems.vertex - 80 * (1 - 2 * np.eye(16))
    assert np.array_equal(match_graphs(problems.with_vertex(moved)), np.tile(np.arange(16), (40, 1)))


def test_identity_is_certain__only_where_every_permutation_is_worse():
    problems = noisy_graphs(1, 30, 5, 2, noise=1.0)
    for step_size in (0.5, 2.0, 5.0, 20.0):
        certain = identity_is_certain(problems, step_size)
        moved = problems.with_vertex(problems.vertex - step_size * (1 - 2 * np.eye(5)))
        is_identity = (match_graphs(moved, restarts=4) == np.arange(5)).all(axis=1)
        assert not (certain & ~is_identity).any()
    assert certain.all()


def test_matching_loss__the_gradient_is_the_rule_printed():
    problems = noisy_graphs(2, 6, 5, 2, noise=0.3)
    setting = MatchingSetting(step_size=0.7, restarts=8)
    vertex, edges = as_tensors(problems)
    edges.affinity.requires_grad_()
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    (matching_loss(vertex, edges, None, setting)[0] * weights).sum().backward()

    def best(affinity, graph):
        def value(permutation):
            moved = replace(problems, vertex=affinity)
            from tests.losses.test_assignment import value_of

            return value_of(moved, graph, permutation)

        return np.eye(5)[list(max(itertools.permutations(range(5)), key=value))]

    for graph in range(6):
        first = best(problems.vertex, graph)
        second = best(problems.vertex - 0.7 * (1 - 2 * np.eye(5)), graph)
        wanted = weights[graph].item() * (first - second) / 0.7
        np.testing.assert_allclose(vertex.grad[graph], wanted, atol=1e-9)
        for i, r, a, q in itertools.product(range(5), range(2), range(5), range(2)):
            j, b = problems.heads[graph, i, r], problems.other_heads[graph, a, q]
            both = first[i, a] * first[j, b] - second[i, a] * second[j, b]
            found = edges.affinity.grad[graph, i, r, a, q].item()
            assert found == pytest.approx(weights[graph].item() * both / 0.7, abs=1e-9)


def test_matching_loss__large_steps_leave_the_difference_to_the_identity():
    problems = noisy_graphs(3, 10, 8, 3, noise=1.0)
    vertex, edges = as_tensors(problems)
    matching_loss(vertex, edges, None, MatchingSetting(step_size=80.0))[0].sum().backward()
    found = np.eye(8)[match_graphs(problems)]
    np.testing.assert_allclose(vertex.grad, (found - np.eye(8)) / 80)


VERTEX = torch.tensor([[0.3, 0.1, -0.4], [0.2, -0.1, 0.5], [0.0, 0.6, 0.1]], dtype=torch.float64)
NOISE = torch.from_numpy(np.random.default_rng(0).gumbel(size=(8_000, 3, 3)))
PERMUTATIONS = [list(each) for each in itertools.permutations(range(3))]
HAMMING = torch.tensor([2.0 * sum(i != a for i, a in enumerate(each)) for each in PERMUTATIONS], dtype=torch.float64)


def values_of_all(affinity):
    return torch.stack([(affinity + NOISE)[:, range(3), each].sum(1) for each in PERMUTATIONS], dim=1)


def mean_gradient(step_size):
    one = VERTEX.clone().requires_grad_()
    loss = matching_loss(one.expand(len(NOISE), 3, 3), None, NOISE, MatchingSetting(step_size=step_size))[0].mean()
    loss.backward()
    return loss.item(), one.grad


def finite_differences(function, step):
    changes = torch.eye(9, dtype=torch.float64).view(9, 3, 3) * step
    return torch.stack([(function(VERTEX + each) - function(VERTEX - each)) / (2 * step) for each in changes]).view(3, 3)


def test_matching_loss__the_gradient_is_that_of_the_smoothed_loss():
    """Of (F(c) - F(c - step gradient)) / step, where F is the mean over noise of the best matching's value."""
    step_size = 0.5
    pulled = step_size * (1 - 2 * torch.eye(3, dtype=torch.float64))

    def smoothed(affinity):
        return (values_of_all(affinity).max(1).values - values_of_all(affinity - pulled).max(1).values).mean() / step_size

    torch.testing.assert_close(mean_gradient(step_size)[1], finite_differences(smoothed, 0.002), atol=0.01, rtol=0)


def test_matching_loss__at_a_small_step_it_is_the_gradient_of_the_mean_hamming_distance():
    def mean_distance(affinity):
        return HAMMING[values_of_all(affinity).argmax(1)].mean()

    loss, gradient = mean_gradient(0.05)
    assert loss == pytest.approx(mean_distance(VERTEX).item())
    torch.testing.assert_close(gradient, finite_differences(mean_distance, 0.1), atol=0.12, rtol=0)
    assert gradient.abs().max() > 0.4
