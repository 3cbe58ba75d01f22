"""DINO against loops over crops and images; the chunked form against the plain one."""

import pytest
import torch

from meddino.losses.dino import dino_terms
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from tests.losses.conftest import assignments
from tests.reference.plain import dino_loss


def slow(student, teacher, temperature, ignore_diagonal):
    total, pairs = 0.0, 0
    for s in range(len(student)):
        for t in range(len(teacher)):
            if ignore_diagonal and s == t:
                continue
            for b in range(student.shape[1]):
                exponentials = [torch.exp(value / temperature) for value in student[s, b].double()]
                log_probs = torch.log(torch.stack(exponentials) / sum(exponentials))
                total -= float((teacher[t, b].double() * log_probs).sum())
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("num_local", [1, 3])
def test_dino_terms__equal_the_slow_loop(num_local):
    batch, prototypes = 3, 7
    crops, local = torch.randn(2, batch, prototypes), torch.randn(num_local, batch, prototypes)
    logits = torch.randn(2 * batch, prototypes)
    teacher = assignments(logits, 0.1).view(2, batch, prototypes)
    # With the identity as prototypes a bottleneck is the logits.
    terms = dino_terms(crops, local, torch.eye(prototypes), sinkhorn_targets(TeacherLogits(logits), 0.1), 0.2)
    assert float(terms.global_crops) == pytest.approx(slow(crops, teacher, 0.2, True), rel=1e-5)
    assert float(terms.local_crops) == pytest.approx(slow(local, teacher, 0.2, False), rel=1e-5)


def test_dino_terms__of_a_student_without_an_opinion_are_the_logarithm_of_k():
    targets = sinkhorn_targets(TeacherLogits(torch.randn(4, 16)), 0.1)
    terms = dino_terms(torch.zeros(2, 2, 3), torch.zeros(1, 2, 3), torch.randn(16, 3), targets)
    assert float(terms.global_crops) == pytest.approx(2.7725887) == float(terms.local_crops)


@pytest.mark.parametrize("num_local", [0, 3])
def test_dino_terms__equals_the_plain_form_and_so_do_gradients(num_local):
    batch, dim, prototypes = 3, 6, 40
    global_bottleneck = torch.randn(2, batch, dim, requires_grad=True)
    local_bottleneck = torch.randn(num_local, batch, dim, requires_grad=True)
    weight = torch.randn(prototypes, dim, requires_grad=True)
    logits = torch.randn(2 * batch, prototypes)
    probabilities = assignments(logits, 0.06).view(2, batch, prototypes)
    expected_global = dino_loss(global_bottleneck @ weight.t(), probabilities, 0.1, ignore_diagonal=True)
    expected = 0.3 * expected_global
    if num_local:
        expected_local = dino_loss(local_bottleneck @ weight.t(), probabilities, 0.1)
        expected = expected + 0.6 * expected_local
    terms = dino_terms(
        global_bottleneck, local_bottleneck, weight, sinkhorn_targets(TeacherLogits(logits), 0.06), 0.1, 0.3, 0.6
    )
    torch.testing.assert_close(terms.weighted, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.global_crops, expected_global.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        terms.local_crops, expected_local.detach() if num_local else torch.tensor(0.0), rtol=1e-5, atol=1e-5
    )
    variables = [global_bottleneck, weight, *([local_bottleneck] if num_local else [])]
    for found, wanted in zip(
        torch.autograd.grad(terms.weighted * 2, variables), torch.autograd.grad(expected * 2, variables), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_dino_terms__weight_zero():
    bottleneck, weight = torch.randn(2, 2, 4), torch.randn(5, 4)
    targets = sinkhorn_targets(TeacherLogits(torch.randn(4, 5)), 0.1)
    terms = dino_terms(bottleneck, bottleneck, weight, targets, 0.1, global_weight=1.0, local_weight=0.0)
    assert float(terms.local_crops) == 0.0
    torch.testing.assert_close(terms.weighted, terms.global_crops)


def test_dino_terms__refuses_other_targets():
    with pytest.raises(ValueError, match="2 crops of 3 images, 4 targets"):
        dino_terms(
            torch.zeros(2, 3, 4),
            torch.zeros(0, 3, 4),
            torch.zeros(5, 4),
            sinkhorn_targets(TeacherLogits(torch.zeros(4, 5)), 0.1),
        )
