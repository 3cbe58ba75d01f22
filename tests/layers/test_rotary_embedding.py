"""Rotary embedding against the formula written out."""

import math

import pytest
import torch

from meddino.core.errors import ConfigError
from meddino.layers.rotary_embedding import RotaryEmbedding, RotaryTable, rotate


def slow_angles(height, width, head_dim, base):
    """Angles [patches, head_dim] by loops, from RECIPE's sentence."""
    rows = []
    for y in range(height):
        for x in range(width):
            angles = []
            for coordinate in (2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1):
                angles += [2 * math.pi * coordinate / base ** (2 * i / (head_dim / 2)) for i in range(head_dim // 4)]
            rows.append(angles * 2)
    return torch.tensor(rows)


def test_forward__equals_the_formula():
    table = RotaryEmbedding(16, base=100.0)(3, 5, prefix=2)
    angles = slow_angles(3, 5, 16, 100.0)
    torch.testing.assert_close(table.sin[2:], angles.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(table.cos[2:], angles.cos(), atol=1e-6, rtol=0)
    assert torch.equal(table.sin[:2], torch.zeros(2, 16))
    assert torch.equal(table.cos[:2], torch.ones(2, 16))


def test_rotate__equals_pairwise_rotation():
    x = torch.randn(2, 6, 3, 8)
    table = RotaryEmbedding(8)(2, 2, prefix=2)
    turned = rotate(x, table)
    for i in range(4):
        first, second = x[..., i], x[..., i + 4]
        sin, cos = table.sin[:, i][:, None], table.cos[:, i][:, None]
        torch.testing.assert_close(turned[..., i], first * cos - second * sin)
        torch.testing.assert_close(turned[..., i + 4], second * cos + first * sin)
    assert torch.equal(turned[:, :2], x[:, :2])


def test_rotate__gradient():
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    table = RotaryEmbedding(8, dtype=torch.float64)(2, 1, prefix=2)
    assert torch.autograd.gradcheck(lambda tensor: rotate(tensor, RotaryTable(table.sin, table.cos)), x)


@pytest.mark.parametrize(("normalise", "divisors"), [("max", (4, 4)), ("min", (2, 2)), ("separate", (2, 4))])
def test_forward__normalisation(normalise, divisors):
    table = RotaryEmbedding(4, normalise=normalise)(2, 4, prefix=0)
    y, x = 2 * 0.5 / divisors[0] - 1, 2 * 0.5 / divisors[1] - 1
    expected = torch.tensor([2 * math.pi * y, 2 * math.pi * x] * 2).sin()
    torch.testing.assert_close(table.sin[0], expected, atol=1e-6, rtol=0)


def test_forward__rescale_is_one_log_uniform_factor():
    rope = RotaryEmbedding(4, rescale=2.0)
    plain = torch.linspace(-1, 1, 9)[1::2]  # patch centres of 4
    factors = []
    for seed in range(300):
        angles = _coordinates(rope, seed)
        factor = angles[:, 0] / plain
        torch.testing.assert_close(factor, factor[:1].expand(4))
        torch.testing.assert_close(angles[:, 1], plain * factor)
        factors.append(math.log2(factor[0]))
    assert -1 <= min(factors) < -0.9
    assert 0.9 < max(factors) <= 1
    assert abs(sum(factors) / len(factors)) < 0.12


def _coordinates(rope, seed):
    """What the augmentation makes of the diagonal of a 4 x 4 grid."""
    plain = torch.linspace(-1, 1, 9)[1::2]
    return rope._augmented(torch.stack([plain, plain], dim=1), torch.Generator().manual_seed(seed))


def test_forward__shift_and_jitter_act_on_each_axis():
    plain = torch.linspace(-1, 1, 9)[1::2]
    shifted = _coordinates(RotaryEmbedding(4, shift=0.3), 1) - plain[:, None]
    assert (shifted.abs() <= 0.3).all()
    torch.testing.assert_close(shifted, shifted[:1].expand(4, 2))
    assert abs(shifted[0, 0] - shifted[0, 1]) > 1e-3
    jittered = _coordinates(RotaryEmbedding(4, jitter=1.5), 1) / plain[:, None]
    torch.testing.assert_close(jittered, jittered[:1].expand(4, 2))
    assert ((jittered >= 1 / 1.5) & (jittered <= 1.5)).all()
    assert abs(jittered[0, 0] - jittered[0, 1]) > 1e-3


def test_forward__same_generator_same_table():
    rope = RotaryEmbedding(8, shift=0.1, jitter=1.2, rescale=2.0)
    tables = [rope(3, 3, 1, torch.Generator().manual_seed(seed)).sin for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_init__refuses_a_head_width_that_does_not_divide():
    with pytest.raises(ConfigError, match="multiple of 4, not 6"):
        RotaryEmbedding(6)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_rotate__in_bf16_equals_the_formula_and_so_does_its_gradient(table_dtype):
    table = RotaryEmbedding(16, dtype=table_dtype)(3, 2, prefix=2)
    x = torch.randn(5, 8, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    aim = torch.randn(5, 8, 4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.detach().float().requires_grad_()
    wide = RotaryTable(table.sin.float(), table.cos.float())
    found, wanted = rotate(x, table), rotate(exact, wide)
    (by_x,), (by_exact,) = torch.autograd.grad(found, x, aim), torch.autograd.grad(wanted, exact, aim.float())
    tolerance = 8e-3 if table_dtype == torch.float32 else 3e-2  # one rounding, or one of each product
    assert found.dtype == by_x.dtype == torch.bfloat16 and found.is_contiguous()
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(by_x.float(), by_exact, atol=tolerance, rtol=tolerance)
