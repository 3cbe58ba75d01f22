"""In which types a network computes in bfloat16: the residual stream of student and teacher, forward and back, and its ends."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meddino.models.registry import build_backbone


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(("drop_path", "training"), [(0.0, True), (0.4, True), (0.4, False)])
def test_stream__is_bfloat16_from_the_first_block_to_the_last_norm(drop_path, training, checkpointing):
    torch.manual_seed(0)
    backbone = build_backbone("vitnano8", depth=3, drop_path=drop_path).train(training)
    seen, back = [], []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _block, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
        block.register_full_backward_hook(lambda _block, given, _taken: back.append(given[0].dtype))
    if checkpointing is not None:
        backbone.recompute_activations(selective=checkpointing)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        outputs = backbone.forward_crops([torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)])
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 3
    assert {each.dtype for output in outputs for each in (output.cls_token, output.patch_tokens)} == {torch.float32}
    if training:
        sum(output.patch_tokens.square().sum() for output in outputs).backward()
        assert back == [torch.bfloat16] * 3
        assert {each.grad.dtype for each in backbone.parameters() if each.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("precision", "wanted"), [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_stream__is_as_wide_as_the_weights_without_autocast(precision, wanted):
    backbone, seen = build_backbone("vitnano8", depth=2, drop_path=0.4).to(precision).train(), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _block, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    backbone(torch.randn(2, 3, 16, 16, dtype=precision))
    assert seen == [(wanted, wanted)] * 2


class Copies(TorchDispatchMode):
    """Notes narrow copies of matrices of one shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.made, self.alive = shape, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and tuple(out.shape) == self.shape:
            self.made += 1
            self.alive.add(key := out.untyped_storage()._cdata)
            weakref.finalize(out.untyped_storage(), self.alive.discard, key)
        return out


@pytest.mark.parametrize(("recomputed", "held", "made"), [(False, 3, 3), (True, 0, 6)])
def test_recompute_activations__no_narrow_copy_of_a_weight_is_held_until_it_is_needed_again(recomputed, held, made):
    backbone = build_backbone("vitnano8", depth=3).train()
    if recomputed:
        backbone.recompute_activations()
    with torch.autocast("cpu", torch.bfloat16), Copies(tuple(backbone.blocks[0].mlp.fc1.weight.shape)) as copies:
        output = backbone(torch.randn(2, 3, 16, 16)).patch_tokens
        assert len(copies.alive) == held
        output.sum().backward()
    assert copies.made == made and not copies.alive
