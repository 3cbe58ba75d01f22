"""Linear layers through oneDNN's product against torch's own, values and gradients."""

import time

import pytest
import torch
from torch.nn import functional

from meddino.layers.cpu import matmul as module
from meddino.layers.cpu.matmul import takes
from meddino.layers.linear import KeyMaskedLinear, Linear, linear, product


@pytest.mark.parametrize("onednn", [True, False])
def test_product__transposed_views_and_bias(monkeypatch, onednn):
    if not onednn:
        monkeypatch.setattr(module, "_has_onednn", lambda: False)
    left, right, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    torch.testing.assert_close(product(left, right, bias), left @ right.t() + bias)
    other = torch.randn(5, 4)
    torch.testing.assert_close(product(left.t(), other.t()), left.t() @ other)
    torch.testing.assert_close(product(left[:0], right), torch.zeros(0, 3))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear__equals_torchs_and_so_do_gradients(shape, with_bias):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.randn(5, requires_grad=True) if with_bias else None
    aim = torch.randn(*shape[:-1], 5)
    found, expected = linear(x, weight, bias), functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    variables = [x, weight] + ([bias] if bias is not None else [])
    for one, other in zip(
        torch.autograd.grad((found * aim).sum(), variables), torch.autograd.grad((expected * aim).sum(), variables), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_linear__only_what_is_asked_for():
    layer = Linear(4, 3)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.tolist() == [2.0, 2.0, 2.0]


def test_linear__other_dtypes_take_torchs_path():
    layer = Linear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert not takes(x)
    torch.testing.assert_close(layer(x), x @ layer.weight.t() + layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(4, 3)(torch.randn(2, 4)).dtype == torch.bfloat16


def test_key_masked_linear__no_gradient_reaches_the_key_bias():
    layer = KeyMaskedLinear(4, 12)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.bias.grad.tolist() == [3.0] * 4 + [0.0] * 4 + [3.0] * 4


@torch.no_grad()
def test_product__parts_of_wider_matrices_take_the_fast_way():
    # oneDNN's kernel for a matrix with gaps between its rows is thousands of times slower.
    wide, tokens = torch.randn(64, 2048), torch.randn(512, 64)
    part = wide[:, 256:768]
    assert torch.allclose(product(tokens, part.t()), tokens @ part, atol=1e-4)
    assert torch.allclose(product(part.t(), tokens), part.t() @ tokens.t(), atol=1e-4)

    def seconds(right):
        start = time.perf_counter()
        product(tokens, right)
        return time.perf_counter() - start

    dense, gaps = part.t().contiguous(), part.t()
    assert min(seconds(gaps) for _ in range(5)) < 50 * min(seconds(dense) for _ in range(5))
