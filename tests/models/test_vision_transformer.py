"""The backbone against plain formulas and records; packed crops against crops alone; random choices."""

import pytest
import torch

from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.models import vision_transformer
from meddino.models.vision_transformer import VisionTransformer, ViTConfig
from tests.reference import plain
from tests.reference.backbones import compare_backbone
from tests.reference.own_records import backbone_weights
from tests.reference.records import Records

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 4, "num_registers": 2}


def tiny(**changes):
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # off LayerScale's 1e-5, so that every part shows
    return model


def tokens_of(output):
    return torch.cat([output.cls_token[:, None], output.register_tokens, output.patch_tokens], dim=1)


@pytest.mark.parametrize("gated", [False, True])
def test_forward__equals_the_plain_formulas(gated):
    weights = backbone_weights(torch.Generator().manual_seed(1), dim=24, depth=2, heads=3, patch=4, channels=2, gated=gated)
    kind = {"ffn_layer": "swiglu", "ffn_ratio": 6.0} if gated else {}
    model = VisionTransformer(
        ViTConfig(embed_dim=24, depth=2, num_heads=3, patch_size=4, in_chans=2, num_registers=3, **kind)
    ).eval()
    model.load_state_dict(weights)
    images, mask = torch.randn(2, 2, 8, 12), torch.rand(2, 6) < 0.5
    expected, found = plain.backbone(weights, images, 3, mask), model(images, mask)
    torch.testing.assert_close(found.cls_token, expected.cls_token, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.register_tokens, expected.register_tokens, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.patch_tokens, expected.patch_tokens, atol=2e-5, rtol=0)
    assert found.grid == (2, 3)
    maps = model.get_intermediate_layers(images, (0, -1))
    unmasked = plain.backbone(weights, images, 3)
    for one, other in zip(maps, (unmasked.block_patches[0], unmasked.block_patches[1]), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_forward__recorded(shared_reference):
    records = Records.read(shared_reference)
    items = [item for name in records.backbones() for item in compare_backbone(records, name)]
    assert len(items) > 30
    assert {item.name: item.difference for item in items if not item.passed} == {}


def test_forward_crops__packing_equals_crops_alone():
    model = tiny().eval()
    crops = [torch.randn(2, 3, 16, 12), torch.randn(3, 3, 8, 8), torch.randn(1, 3, 4, 20)]
    masks = [torch.rand(2, 12) < 0.4, None, None]
    packed = model.forward_crops(crops, masks)
    for output, images, mask in zip(packed, crops, masks, strict=True):
        torch.testing.assert_close(tokens_of(output), tokens_of(model(images, mask)), atol=1e-5, rtol=0)


def test_forward_crops__packed_gradients_equal_those_of_crops_alone():
    model = tiny().train()
    crops = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 4, 8)]
    aims = [torch.randn(2, 7, 24), torch.randn(3, 5, 24)]

    def gradients(outputs):
        loss = sum((tokens_of(output) * aim).sum() for output, aim in zip(outputs, aims, strict=True))
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    alone = gradients([model(images) for images in crops])
    for one, other in zip(gradients(model.forward_crops(crops)), alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_forward_crops__parts_of_a_batch_give_what_the_whole_gives():
    """Drop path and coordinate augmentation do not see how the batch is cut into processes and micro-batches."""
    model = tiny(drop_path=0.4, rope_rescale=2.0, rope_shift=0.1, rope_jitter=1.2).train()
    images, small = torch.randn(2, 6, 3, 8, 8), torch.randn(3, 6, 3, 4, 4)  # [crops, samples, ...]

    def forward(samples):
        groups = tuple(CropIndices.of_samples(crops, samples, 6) for crops in (2, 3))
        crops = [stack[:, list(samples)].flatten(0, 1) for stack in (images, small)]
        outputs = model.forward_crops(crops, plan=DropPathPlan(9, 4, groups))
        return [tokens_of(output).unflatten(0, (-1, len(samples))) for output in outputs]

    whole = forward(range(6))
    for samples in ([0], [1, 2], [3, 4, 5]):
        for part, all_of_it in zip(forward(samples), whole, strict=True):
            torch.testing.assert_close(part, all_of_it[:, samples], atol=1e-5, rtol=0)


def test_forward__training_is_a_function_of_the_generator():
    model, images = tiny(drop_path=0.5, rope_rescale=2.0).train(), torch.randn(4, 3, 8, 8)
    first, again, other = (model(images, rng=torch.Generator().manual_seed(seed)).cls_token for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forward__evaluation_draws_nothing():
    model, images = tiny(drop_path=0.5, rope_rescale=2.0).eval(), torch.randn(4, 3, 8, 8)
    state = torch.random.get_rng_state()
    assert torch.equal(model(images).cls_token, model(images).cls_token)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_forward__the_mask_token_replaces_patches():
    model, mask = tiny().eval(), torch.tensor([[True, False, False, True]])
    one, other = torch.randn(2, 1, 3, 8, 8)
    other[:, :, 4:, :4], other[:, :, :4, 4:] = one[:, :, 4:, :4], one[:, :, :4, 4:]  # the patches that are seen
    assert torch.equal(model(one, mask).cls_token, model(other, mask).cls_token)
    assert not torch.allclose(model(one).cls_token, model(other).cls_token)


def test_forward__untied_norms():
    model = tiny(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    crops = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)]
    in_evaluation, in_training = model.eval().forward_crops(crops), model.train().forward_crops(crops)
    assert torch.equal(in_evaluation[0].cls_token, in_training[0].cls_token)
    assert torch.equal(in_evaluation[1].patch_tokens, in_training[1].patch_tokens)
    assert not torch.allclose(in_evaluation[1].cls_token, in_training[1].cls_token)
    assert not torch.allclose(in_evaluation[1].register_tokens, in_training[1].register_tokens)


def test_activation_checkpointing__same_gradients():
    model, crops = tiny(drop_path=0.3).train(), [torch.randn(3, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    draws = DropPathPlan(1, 2, (CropIndices((0, 1, 2), 3), CropIndices((0, 1), 2)))
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.recompute_activations()
        loss = sum(
            output.cls_token.square().sum() + output.patch_tokens.sum() for output in model.forward_crops(crops, plan=draws)
        )
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_activation_checkpointing__one_group_of_crops_after_the_other_gives_the_same_gradients(monkeypatch, drop_path):
    monkeypatch.setattr(vision_transformer, "ALL_GROUPS_AT_ONCE", ())
    model = tiny(drop_path=drop_path).double().train()  # in which only a mistake shows
    crops = [torch.randn(3, 3, 8, 8).double(), torch.randn(2, 3, 4, 4).double()]
    draws, seen, gradients = DropPathPlan(1, 2, (CropIndices((0, 1, 2), 3), CropIndices((0, 1), 2))), [], []
    for recompute in (False, True):
        if recompute:
            for block in model.blocks:
                block.attn.register_forward_hook(lambda _module, arguments, _output: seen.append(len(arguments[1])))
            model.recompute_activations()
        loss = sum(
            output.cls_token.square().sum() + output.patch_tokens.sum() for output in model.forward_crops(crops, plan=draws)
        )
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert seen == [1] * 4 * model.depth  # two groups, forward and once more
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_residual_stream__is_bfloat16_under_autocast_and_the_last_norm_float32(drop_path, training):
    model, seen = tiny(drop_path=drop_path).train(training), []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _arguments, output: seen.append(output.dtype))
        block.norm1.register_forward_hook(lambda _module, _arguments, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(3, 3, 8, 8), rng=torch.Generator().manual_seed(0))
    assert seen == [torch.bfloat16] * 2 * model.depth
    assert output.cls_token.dtype == output.patch_tokens.dtype == torch.float32
    output.patch_tokens.square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


def test_residual_stream__in_bfloat16_is_near_that_in_float32():
    model, images = tiny().eval(), torch.randn(2, 3, 8, 8)
    exact = model(images).patch_tokens
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images).patch_tokens
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_state_dict__official_names():
    names = set(tiny(untie_cls_and_patch_norms=True).state_dict())
    block = {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.qkv.bias_mask", "attn.proj.weight"}
    block |= {"attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"}
    block |= {"mlp.fc2.bias", "ls2.gamma"}
    outside = {"cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    outside |= {"rope_embed.periods", "norm.weight", "norm.bias", "cls_norm.weight", "cls_norm.bias"}
    assert names == outside | {f"blocks.{number}.{name}" for number in range(3) for name in block}


def test_reset_parameters__from_the_meta_device():
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(**TINY))
    model.to_empty(device="cpu")
    model.reset_parameters()
    fresh = VisionTransformer(ViTConfig(**TINY))
    assert torch.equal(model.rope_embed.periods, fresh.rope_embed.periods)
    assert torch.equal(model.blocks[1].attn.qkv.bias_mask, fresh.blocks[1].attn.qkv.bias_mask)
    assert torch.equal(model.blocks[1].ls1.gamma, torch.full((24,), 1e-5))
    assert model(torch.randn(1, 3, 8, 8)).cls_token.isfinite().all()


def test_get_intermediate_layers__without_norm_and_wrong_blocks():
    model, images = tiny().eval(), torch.randn(1, 3, 8, 12)
    (raw,) = model.get_intermediate_layers(images, [1], norm=False)
    (normed,) = model.get_intermediate_layers(images, [1])
    torch.testing.assert_close(model.norm(raw.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(normed), normed)
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        model.get_intermediate_layers(images, [3])


def test_forward__wrong_shapes():
    model = tiny()
    with pytest.raises(ValueError, match="multiples of its patch size 4"):
        model(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"mask of group 0 is \[1, 5\]; its patches are \[1, 4\]"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, dtype=torch.bool))


def test_config__heads_must_divide():
    with pytest.raises(ValueError, match="whole multiple of 4"):
        ViTConfig(embed_dim=24, depth=1, num_heads=4)
