"""Attention against softmax written out; packed crops against crops alone; the block-diagonal mask."""

import sys
import types

import pytest
import torch
from torch.nn import functional

from meddino.core.errors import ConfigError
from meddino.layers import attention
from meddino.layers.attention import SelfAttention
from meddino.layers.linear import KeyMaskedLinear
from meddino.layers.packing import CropGroup
from meddino.layers.rotary_embedding import RotaryEmbedding, rotate

ROPE = RotaryEmbedding(8)
GROUPS = (CropGroup(2, 7, ROPE(2, 3, 1)), CropGroup(3, 5, ROPE(2, 2, 1)))


def layer(mask_k_bias=True):
    torch.manual_seed(0)
    built = SelfAttention(24, 3, qkv_bias=True, mask_k_bias=mask_k_bias)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
    return built


def slow(built, x, groups):
    outputs, start = [], 0
    for group in groups:
        for _ in range(group.batch):
            tokens = x[start : start + group.tokens]
            start += group.tokens
            query, key, value = (part.view(1, -1, 3, 8) for part in built.qkv(tokens).split(24, dim=1))
            query, key = rotate(query, group.table)[0], rotate(key, group.table)[0]
            heads = [torch.softmax(query[:, head] @ key[:, head].T / 8**0.5, dim=1) @ value[0, :, head] for head in range(3)]
            outputs.append(built.proj(torch.cat(heads, dim=1)))
    return torch.cat(outputs)


def test_forward__equals_softmax_written_out():
    built, x = layer(), torch.randn(29, 24)
    torch.testing.assert_close(built(x, GROUPS), slow(built, x, GROUPS), atol=1e-5, rtol=1e-5)


def test_forward__a_group_that_drop_path_emptied():
    built, x = layer(), torch.randn(15, 24)
    groups = (CropGroup(0, 7, GROUPS[0].table), GROUPS[1])
    torch.testing.assert_close(built(x, groups), slow(built, x, groups[1:]), atol=1e-5, rtol=1e-5)
    nothing = built(x[:0], groups[:1])
    assert nothing.shape == (0, 24)
    nothing.sum().backward()
    assert torch.equal(built.qkv.weight.grad, torch.zeros_like(built.qkv.weight))


def stand_in_for_xformers(monkeypatch):
    """Put modules with xformers' interface in its place; the mask is materialised for torch's attention."""

    class BlockDiagonalMask:
        def __init__(self, lengths):
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, lengths, device):
            return cls(lengths)

        def materialize(self):
            return torch.block_diag(*(torch.ones(length, length) for length in self.lengths)).bool()

    def memory_efficient_attention(query, key, value, attn_bias):
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(*parts, attn_mask=attn_bias.materialize()).transpose(1, 2)

    names = {"xformers": {}, "xformers.ops": {"memory_efficient_attention": memory_efficient_attention}}
    names |= {"xformers.ops.fmha": {}, "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask}}
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def xformers_without_its_kernels(monkeypatch):
    """Let xformers check what it is given, make its mask and compute by its own slow formula: it has no kernel for the CPU."""
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed; a stand-in is tested")
    from xformers.attn_bias_utils import ref_attention_bmhk
    from xformers.ops.fmha.common import Inputs

    def memory_efficient_attention(query, key, value, attn_bias):
        Inputs(query, key, value, attn_bias).validate_inputs()
        return ref_attention_bmhk(query, key, value, attn_bias)

    monkeypatch.setattr(ops, "memory_efficient_attention", memory_efficient_attention)


@pytest.mark.parametrize("install", [stand_in_for_xformers, xformers_without_its_kernels])
def test_forward__block_diagonal_path(monkeypatch, install):
    install(monkeypatch)
    attention._block_diagonal_mask.cache_clear()
    built, x = layer(), torch.randn(29, 24)
    built.packed_kernel = "xformers"
    found, expected = built(x, GROUPS), slow(built, x, GROUPS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    emptied = (CropGroup(0, 7, GROUPS[0].table), CropGroup(0, 5, GROUPS[1].table))
    assert built(x[:0], emptied).shape == (0, 24)
    # And the gradient of all weights is that of attention within each group.
    built.packed_kernel = "sdpa"
    weights, aim = list(built.parameters()), torch.randn_like(found)
    ours, each = (torch.autograd.grad(out, weights, aim) for out in (found, built(x, GROUPS)))
    torch.testing.assert_close(ours, each, atol=1e-4, rtol=1e-4)


def test_block_diagonal_mask__one_serves_every_block(monkeypatch):
    stand_in_for_xformers(monkeypatch)
    attention._block_diagonal_mask.cache_clear()
    built, x = layer(), torch.randn(29, 24)
    built.packed_kernel = "xformers"
    for _ in range(3):
        built(x, GROUPS)
    assert attention._block_diagonal_mask.cache_info().misses == 1
    attention._block_diagonal_mask.cache_clear()


def test_use_packed_kernel__never_on_the_cpu():
    built = layer()
    attention.use_packed_kernel(built, "sdpa", torch.device("cpu"))
    with pytest.raises(ConfigError, match="packed_attention is xformers"):
        attention.use_packed_kernel(built, "xformers", torch.device("cpu"))


@pytest.mark.parametrize("mask_k_bias", [True, False])
def test_qkv__key_bias_is_masked(mask_k_bias):
    built = layer(mask_k_bias)
    zeros = torch.zeros(1, 24)
    assert isinstance(built.qkv, KeyMaskedLinear) == mask_k_bias
    assert bool((built.qkv(zeros)[0, 24:48] == 0).all()) == mask_k_bias
    assert (built.qkv(zeros)[0, :24] != 0).all()
    assert (built.qkv(zeros)[0, 48:] != 0).all()
