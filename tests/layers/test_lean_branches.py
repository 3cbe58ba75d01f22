"""Branches as one autograd function against the modules called one after the other."""

import pytest
import torch

from meddino.layers.attention import SelfAttention
from meddino.layers.cpu import lean_branches as module
from meddino.layers.cpu.lean_branches import LeanBlock, is_lean
from meddino.layers.feed_forward import Mlp, SwiGLU
from meddino.layers.packing import CropGroup, KeptSamples, kept_tokens
from meddino.layers.rotary_embedding import RotaryEmbedding


def groups(dtype):
    rope = RotaryEmbedding(8, dtype=dtype)
    return (CropGroup(3, 7, rope(2, 3, 1)), CropGroup(2, 3, rope(1, 2, 1)))


def block(layerscale=0.3, qkv_bias=True):
    torch.manual_seed(1)
    built = LeanBlock(16, SelfAttention(16, 2, qkv_bias, True), Mlp(16, 32), layerscale, norm_eps=1e-6)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


@pytest.mark.parametrize("layerscale", [0.3, None])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("rope_dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("drop", [True, False])
def test_branches__equal_the_modules_and_so_do_gradients(monkeypatch, layerscale, qkv_bias, rope_dtype, tolerance, drop):
    built, x, aim = block(layerscale, qkv_bias), torch.randn(27, 16, requires_grad=True), torch.randn(27, 16)
    kept = None
    if drop:
        empty = torch.tensor([], dtype=torch.int64)
        kept = (KeptSamples((torch.tensor([0, 2]), empty), (1.5, 2.0)), KeptSamples((empty, torch.tensor([1])), (3.0, 2.0)))

    def results():
        output = built(x, groups(rope_dtype), kept and tuple(kept_tokens(kept, groups(rope_dtype), x)))
        variables = [x, *built.parameters()]
        return [output, *torch.autograd.grad((output * aim).sum(), variables, allow_unused=True)]

    assert is_lean(x, built.norm1, built.attn)
    lean = results()
    monkeypatch.setattr(module, "is_lean", lambda *_arguments: False)
    for one, other in zip(lean, results(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).detach().norm()) <= tolerance * float(other.detach().norm()) + 1e-6


def test_branches__frozen_parameters_get_no_gradient():
    built, x = block(), torch.randn(27, 16)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    built(x, groups(torch.float32)).sum().backward()
    for name, parameter in built.named_parameters():
        assert (parameter.grad is not None) == name.endswith("bias")


def test_branches__no_gradient_wanted():
    built = block().requires_grad_(False)
    assert not built(torch.randn(27, 16), groups(torch.float32)).requires_grad


def test_is_lean__steps_back_for_other_layers_hooks_and_dtypes():
    built, x = block(), torch.randn(3, 16)
    assert is_lean(x, built.norm2, built.mlp)
    assert not is_lean(x.double(), built.norm2, built.mlp)
    assert not is_lean(x, built.norm2, SwiGLU(16, 32))
    handle = built.mlp.fc1.register_forward_hook(lambda *_arguments: None)
    assert not is_lean(x, built.norm2, built.mlp)
    handle.remove()
    built.mlp.fc1 = torch.nn.Sequential(built.mlp.fc1)  # as LoRA's wrappers do
    assert not is_lean(x, built.norm2, built.mlp)
    built.attn.proj = torch.nn.Linear(16, 16)
    assert not is_lean(x, built.norm1, built.attn)
