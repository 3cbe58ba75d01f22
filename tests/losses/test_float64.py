"""Float64 in, float64 out: each loss keeps every digit, and its gradient is that of finite differences."""

import torch

from meddino.losses.dino import dino_terms
from meddino.losses.gram import gram_loss
from meddino.losses.ibot import ibot_term, mask_weights_of
from meddino.losses.koleo import koleo_loss
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from tests.losses.conftest import assignments


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=grad)


def assert_gradient_fits(loss, *tensors):
    """The gradient along a random direction is the difference quotient (autograd's gradcheck goes backward more than once)."""
    value = loss(*tensors)
    assert value.dtype == torch.float64
    gradients = torch.autograd.grad(value, tensors)
    step = 1e-5
    for number, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (
                loss(*(x + sign * step * direction if i == number else x for i, x in enumerate(tensors))) for sign in (1, -1)
            )
        torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-9)


def test_sinkhorn__equals_the_formula_to_twelve_digits():
    logits = double(6, 9, grad=False)
    q = torch.exp(logits / 0.1).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * 9
        q /= q.sum(dim=0, keepdim=True) * 6
    found = assignments(logits, 0.1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (q * 6).t(), atol=1e-12, rtol=1e-12)


def test_dino__gradient_is_that_of_finite_differences():
    targets = sinkhorn_targets(TeacherLogits(double(4, 7, grad=False)), 0.1)
    assert_gradient_fits(
        lambda crops, local, weight: dino_terms(crops, local, weight, targets, 0.2, 0.7, 0.3).weighted,
        double(2, 2, 5),
        double(3, 2, 5),
        double(7, 5),
    )


def test_ibot__gradient_is_that_of_finite_differences():
    weights = mask_weights_of(torch.tensor([[True, False, True], [False, True, False]]))
    targets = sinkhorn_targets(TeacherLogits(double(3, 7, grad=False)), 0.1)
    assert_gradient_fits(lambda masked, weight: ibot_term(masked, weight, targets, weights, 2, 0.2), double(3, 5), double(7, 5))


def test_koleo__gradient_is_that_of_finite_differences():
    assert_gradient_fits(koleo_loss, double(5, 6))


def test_gram__gradient_is_that_of_finite_differences():
    teacher = double(2, 4, 6, grad=False).flip(0)
    assert_gradient_fits(lambda student: gram_loss(student, teacher), double(2, 4, 6))
