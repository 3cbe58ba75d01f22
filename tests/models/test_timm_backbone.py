"""Models of timm behind the protocol of backbones, held against timm itself and plain loops."""

import copy

import pytest
import timm
import torch

from meddino.core.errors import ConfigError
from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.models.registry import backbone_config, backbone_from_config, build_backbone
from meddino.models.timm_backbone import TimmConfig

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
SMALL = [("timm:resnet10t", {}), ("timm:vit_tiny_patch16_224", SMALL_VIT)]


def small(name: str, **changes):
    torch.manual_seed(0)
    return build_backbone(name, **changes)


def images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_tokens__of_a_resnet_are_timms_last_map_and_its_mean():
    backbone = small("timm:resnet10t").eval()
    output, features = backbone.tokens(images(side=64)), backbone.model.forward_features(images(side=64))
    assert (backbone.embed_dim, backbone.patch_size, backbone.multiple_px, output.grid) == (512, 32, 1, (2, 2))
    assert torch.equal(output.patch_map, features)
    assert torch.equal(output.cls_token, features.mean((2, 3)))
    assert output.register_tokens.shape == (2, 0, 512)


def test_tokens__of_a_vit_are_timms_tokens_after_its_last_norm():
    backbone = small("timm:vit_tiny_patch16_224", **SMALL_VIT).eval()
    output, features = backbone.tokens(images()), backbone.model.forward_features(images())
    assert (backbone.embed_dim, backbone.patch_size, backbone.multiple_px, output.grid) == (32, 8, 8, (4, 4))
    torch.testing.assert_close(output.cls_token, features[:, 0])
    torch.testing.assert_close(output.patch_tokens, features[:, 1:])


@pytest.mark.parametrize(("name", "changes"), SMALL)
def test_layer_groups__every_trained_parameter_once_from_input_to_output(name, changes):
    backbone = small(name, **changes)
    groups = backbone.layer_groups()
    names = [parameter for group in groups for parameter in group.parameters]
    assert sorted(names) == sorted(key for key, value in backbone.named_parameters() if value.requires_grad)
    distances = [group.distance for group in groups]
    assert distances == sorted(distances, reverse=True) and [group.is_stem for group in groups].count(True) == 1
    for group in groups:
        inside = {id(value) for value in group.module.parameters()} if group.module else set()
        assert inside <= {id(backbone.get_parameter(key)) for key in group.parameters}


def test_layer_groups__the_last_norm_of_a_vit_stands_beside_its_last_block():
    groups = small("timm:vit_tiny_patch16_224", **SMALL_VIT).layer_groups()
    assert [(group.name, group.distance) for group in groups] == [
        ("tokens", 2),
        ("stem", 2),
        ("blocks.0", 1),
        ("blocks.1", 0),
        ("norm.weight", 0),
    ]
    assert [group.module is not None for group in groups] == [False, False, True, True, False]


def test_layer_groups__of_a_resnet_are_its_blocks():
    groups = small("timm:resnet10t").layer_groups()
    assert [group.name for group in groups if group.module] == [f"layer{number}.0" for number in (1, 2, 3, 4)]
    assert all("conv1" in name or "bn1" in name for group in groups if group.is_stem for name in group.parameters)


@pytest.mark.parametrize(("name", "changes"), SMALL)
def test_recompute_activations__same_gradients_and_statistics(name, changes):
    plain = small(name, **changes).train()
    recomputed = copy.deepcopy(plain)
    recomputed.recompute_activations()
    recomputed = copy.deepcopy(recomputed)  # a copy recomputes itself, not what it is a copy of
    for backbone in (plain, recomputed):
        output = backbone.tokens(images())
        (output.cls_token.square().sum() + output.patch_tokens.sum()).backward()
    for (key, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), key
    for (key, one), other in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other), key


def test_tokens__drop_path_is_a_function_of_seed_and_step():
    backbone = small("timm:vit_tiny_patch16_224", **SMALL_VIT, drop_path_rate=0.5).train()
    plan = DropPathPlan(3, 5, (CropIndices.of_samples(1, range(8), 8),))
    state = torch.get_rng_state()
    first = backbone.tokens(images(8), plan=plan).cls_token
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(first, backbone.tokens(images(8), plan=plan).cls_token)
    assert not torch.equal(first, backbone.tokens(images(8), plan=DropPathPlan(3, 6, plan.groups)).cls_token)


def test_unused_parameters__are_not_trained():
    # Pooled by the mean, timm's model normalises after pooling, which is not done here.
    backbone = small("timm:vit_tiny_patch16_224", **SMALL_VIT, global_pool="avg")
    assert {key for key, value in backbone.named_parameters() if not value.requires_grad} >= {"model.fc_norm.weight"}
    output = backbone.tokens(images())
    (output.cls_token.sum() + output.patch_tokens.square().sum()).backward()
    assert all(value.grad is not None for value in backbone.parameters() if value.requires_grad)


def test_get_intermediate_layers__each_at_its_own_stride():
    maps = small("timm:resnet10t").eval().get_intermediate_layers(images(side=64), (1, -1))
    assert [tuple(one.shape) for one in maps] == [(2, 64, 16, 16), (2, 512, 2, 2)]
    with pytest.raises(ValueError, match="blocks 0 to 4"):
        small("timm:resnet10t").get_intermediate_layers(images(), (5,))


def test_config__builds_the_same_network_again():
    config = backbone_config("timm:vit_tiny_patch16_224", **SMALL_VIT)
    assert isinstance(config, TimmConfig) and config.timm_version == timm.__version__
    again = backbone_from_config(TimmConfig.model_validate_json(config.model_dump_json()))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in backbone_from_config(config).state_dict().items()
    }


def test_config__unknown_names():
    with pytest.raises(ConfigError, match="timm has no model 'resnet51'"):
        backbone_config("timm:resnet51")
    with pytest.raises(ConfigError, match=r"cannot be built with .*no_such_argument"):
        backbone_config("timm:resnet10t", no_such_argument=1)


def test_forward__wrong_sizes():
    with pytest.raises(ValueError, match="multiples of 8"):
        small("timm:vit_tiny_patch16_224", **SMALL_VIT).tokens(images(side=36))
    with pytest.raises(ValueError, match="needs C = 3"):
        small("timm:resnet10t").tokens(torch.zeros(1, 1, 32, 32))
