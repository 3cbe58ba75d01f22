"""A block's residuals, with and without drop path."""

import torch

from meddino.layers.attention import SelfAttention
from meddino.layers.block import TransformerBlock
from meddino.layers.feed_forward import Mlp
from meddino.layers.packing import CropGroup, KeptSamples, kept_tokens
from meddino.layers.rotary_embedding import RotaryEmbedding

ROPE = RotaryEmbedding(8)
GROUPS = (CropGroup(3, 5, ROPE(2, 2, 1)), CropGroup(2, 3, ROPE(1, 2, 1)))


def block():
    torch.manual_seed(1)
    return TransformerBlock(16, SelfAttention(16, 2, True, True), Mlp(16, 32), layerscale_init=0.3, norm_eps=1e-6)


def slow(built, x, groups, kept):
    """Every sample by itself; a dropped one keeps its tokens."""
    rows, start = [], 0
    for number, group in enumerate(groups):
        one = (CropGroup(1, group.tokens, group.table),)
        for sample in range(group.batch):
            tokens = x[start : start + group.tokens]
            start += group.tokens
            if kept is None or sample in kept[0].indices[number]:
                scale = 1.0 if kept is None else kept[0].scales[number]
                tokens = tokens + built.ls1.gamma * built.attn(built.norm1(tokens), one) * scale
            if kept is None or sample in kept[1].indices[number]:
                scale = 1.0 if kept is None else kept[1].scales[number]
                tokens = tokens + built.ls2.gamma * built.mlp(built.norm2(tokens)) * scale
            rows.append(tokens)
    return torch.cat(rows)


def test_forward__equals_the_formula():
    built, x = block(), torch.randn(21, 16)
    torch.testing.assert_close(built(x, GROUPS), slow(built, x, GROUPS, None), atol=1e-5, rtol=1e-5)


def test_forward__drop_path_equals_the_slow_loop_and_so_do_gradients():
    kept = (
        KeptSamples((torch.tensor([0, 2]), torch.tensor([1])), (1.5, 2.0)),
        KeptSamples((torch.tensor([1]), torch.tensor([], dtype=torch.int64)), (3.0, 2.0)),
    )
    built, x = block(), torch.randn(21, 16, requires_grad=True)
    target = torch.randn(21, 16)
    found, expected = built(x, GROUPS, tuple(kept_tokens(kept, GROUPS, x))), slow(built, x, GROUPS, kept)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    variables = [x, *built.parameters()]
    gradients = zip(
        torch.autograd.grad((found * target).sum(), variables),
        torch.autograd.grad((expected * target).sum(), variables),
        strict=True,
    )
    for one, other in gradients:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_forward__without_layerscale():
    built = TransformerBlock(16, SelfAttention(16, 2, True, True), Mlp(16, 32), layerscale_init=None, norm_eps=1e-6)
    x = torch.randn(15, 16)
    middle = x + built.attn(built.norm1(x), GROUPS[:1])
    torch.testing.assert_close(built(x, GROUPS[:1]), middle + built.mlp(built.norm2(middle)))
