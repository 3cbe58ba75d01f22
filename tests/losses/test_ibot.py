"""iBOT against a loop over masked patches; the chunked form against the plain one."""

import pytest
import torch

from meddino.losses import prototype_cross_entropy, sinkhorn
from meddino.losses.ibot import ibot_term, mask_weights_of
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from tests.losses.conftest import assignments
from tests.reference.plain import ibot_loss

MASKS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def test_mask_weights_of__one_over_the_masked_of_the_image():
    assert mask_weights_of(MASKS).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_ibot_term__equals_the_slow_loop():
    student, logits = torch.randn(4, 9), torch.randn(4, 9)
    teacher, total, row = assignments(logits, 0.1), 0.0, 0
    for image in MASKS:
        count = int(image.sum())
        for _ in range(count):
            exponentials = torch.exp(student[row].double() / 0.2)
            total -= float((teacher[row] * torch.log(exponentials / exponentials.sum())).sum()) / count
            row += 1
    targets = sinkhorn_targets(TeacherLogits(logits), 0.1)
    found = ibot_term(student, torch.eye(9), targets, mask_weights_of(MASKS), 3, 0.2)
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
def test_ibot_term__equals_the_plain_form_and_so_do_gradients(monkeypatch, chunked):
    if chunked:
        monkeypatch.setitem(sinkhorn.CHUNK_ELEMENTS, "cpu", 100)
        monkeypatch.setitem(prototype_cross_entropy.PRODUCT_ROWS, "cpu", 5)
    rows, dim, prototypes = 13, 6, 40
    bottleneck, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(prototypes, dim, requires_grad=True)
    logits, mask_weights = torch.randn(rows, prototypes), torch.rand(rows)
    expected = ibot_loss(bottleneck @ weight.t(), assignments(logits, 0.06), mask_weights, 4, 0.1)
    found = ibot_term(bottleneck, weight, sinkhorn_targets(TeacherLogits(logits), 0.06), mask_weights, 4, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, [bottleneck, weight]), torch.autograd.grad(expected, [bottleneck, weight]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_ibot_term__no_masked_patch():
    bottleneck, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = ibot_term(bottleneck, weight, sinkhorn_targets(TeacherLogits(torch.zeros(0, 5)), 0.1), torch.zeros(0), 2)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_ibot_term__large_logits_keep_their_digits():
    # Logits around 100 temperatures: a log-sum-exp that keeps the maximum would lose five digits of the gradient.
    bottleneck, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8) * 4
    logits, mask_weights = torch.randn(6, 50), torch.ones(6)
    (found,) = torch.autograd.grad(
        ibot_term(bottleneck, weight, sinkhorn_targets(TeacherLogits(logits), 0.1), mask_weights, 6), bottleneck
    )
    double = bottleneck.detach().double().requires_grad_(True)
    probabilities = assignments(logits, 0.1).double()
    loss = -(probabilities * torch.log_softmax(double @ weight.double().t() / 0.1, -1)).sum() / 6
    (expected,) = torch.autograd.grad(loss, double)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_ibot_term__without_gradient():
    with torch.no_grad():
        loss = ibot_term(
            torch.randn(3, 4), torch.randn(5, 4), sinkhorn_targets(TeacherLogits(torch.randn(3, 5)), 0.1), torch.ones(3), 2
        )
    assert not loss.requires_grad


def test_ibot_term__autocast_takes_the_products_alone():
    # Around it everything stays float32, forward and backward, wherever the caller goes backward.
    bottleneck, weight = torch.randn(6, 8), torch.randn(50, 8)
    targets, mask_weights = sinkhorn_targets(TeacherLogits(torch.randn(6, 50)), 0.1), torch.rand(6)
    rounded = [tensor.bfloat16().float().requires_grad_(True) for tensor in (bottleneck, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ibot_term(*rounded, targets, mask_weights, 3, 0.5)
        gradients = torch.autograd.grad(found, rounded)
    logits = (rounded[0] / 0.5).bfloat16().double() @ rounded[1].double().t()
    log_probs = torch.log_softmax(logits.bfloat16().double(), -1)
    expected = (-(targets.probabilities().double() * log_probs).sum(-1) * mask_weights.double()).sum() / 3
    assert found.dtype == torch.float32 and abs(float(found) - float(expected)) < 1e-6
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
