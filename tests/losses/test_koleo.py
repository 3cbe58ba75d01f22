"""KoLeo against a loop over pairs, alone and cut into parts."""

import math

import pytest
import torch

from meddino.losses.koleo import koleo_loss


def slow(features):
    x = [row / row.norm() for row in features.double()]
    logs = [math.log(min(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i) + 1e-8) for i in range(len(x))]
    return -sum(logs) / len(logs)


def test_koleo_loss__equals_the_slow_loop():
    features = torch.randn(7, 5)
    assert float(koleo_loss(features)) == pytest.approx(slow(features), rel=1e-5)


def test_koleo_loss__two_opposite_points():
    assert float(koleo_loss(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-math.log(2), abs=1e-6)


def test_koleo_loss__parts_against_everyone_average_to_the_whole_and_so_do_gradients():
    features = torch.randn(8, 5, requires_grad=True)
    whole = koleo_loss(features)
    parts = torch.stack(
        [koleo_loss(features[start : start + 2], everyone=features, first=start) for start in (0, 2, 4, 6)]
    ).mean()
    torch.testing.assert_close(parts, whole)
    (found,), (expected,) = torch.autograd.grad(parts, features), torch.autograd.grad(whole, features)
    torch.testing.assert_close(found, expected)


def test_koleo_loss__equal_features_stay_finite():
    features = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


def test_koleo_loss__a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two samples"):
        koleo_loss(torch.randn(1, 4))


def test_koleo_loss__must_find_itself_among_everyone():
    with pytest.raises(ValueError, match="2 samples from row 3 of 4"):
        koleo_loss(torch.randn(2, 4), everyone=torch.randn(4, 4), first=3)


def test_koleo_loss__nearly_equal_features_lose_no_digits():
    # What a fresh backbone gives: distances of 1e-6, of which float32 would keep one digit.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(16, dtype=torch.float64, generator=generator)
    features = base + 1e-6 * torch.randn(6, 16, dtype=torch.float64, generator=generator)
    assert float(koleo_loss(features)) == pytest.approx(slow(features), rel=2e-3)  # eps is felt at this distance
    assert koleo_loss(features.float()).dtype == torch.float32
