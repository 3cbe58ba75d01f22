"""Perceptrons against their formulas."""

import pytest
import torch

from meddino.core.errors import ConfigError
from meddino.layers.feed_forward import SwiGLU, build_feed_forward


@pytest.mark.parametrize(
    ("kind", "dim", "ratio", "width"),
    [
        ("swiglu", 24, 4.0, 64),
        ("swiglu", 10, 4.0, 32),
        ("swiglu64", 64, 3.0, 128),
        ("swiglu64", 72, 3.0, 192),
        ("swiglu128", 72, 3.0, 256),
    ],
)
def test_build_feed_forward__hidden_width_is_rounded_up(kind, dim, ratio, width):
    built = build_feed_forward(kind, dim, ratio)
    assert built.w1.weight.shape == (width, dim)
    assert built.w3.weight.shape == (dim, width)


def test_swiglu__equals_the_formula():
    layer = SwiGLU(4, 12)
    x = torch.randn(3, 4)
    gate = x @ layer.w1.weight.T + layer.w1.bias
    value = x @ layer.w2.weight.T + layer.w2.bias
    expected = (gate / (1 + torch.exp(-gate)) * value) @ layer.w3.weight.T + layer.w3.bias
    torch.testing.assert_close(layer(x), expected)


def test_build_feed_forward__unknown_kind():
    with pytest.raises(ConfigError, match="'glu'; allowed: mlp, swiglu"):
        build_feed_forward("glu", 8, 4.0)
