"""Every released DINOv3 size, up to 7B, by names and shapes alone: ours, timm's and transformers' describe one model."""

import pytest
import torch

from meddino.checkpoints.export.to_timm import timm_model
from meddino.checkpoints.export.to_transformers import transformers_config
from meddino.checkpoints.weights.infer_architecture import architecture_of, backbone_name
from meddino.checkpoints.weights.key_formats import DERIVED, detect_layout, to_official
from meddino.models.registry import BACKBONES
from meddino.models.vision_transformer import VisionTransformer

RELEASED = [name for name in sorted(BACKBONES) if name not in ("vitt16", "vitnano8")]
# Backbone parameters in millions, as the DINOv3 paper's table of models has them.
PUBLISHED_MILLIONS = {"vits16": 21, "vits16plus": 29, "vitb16": 86, "vitl16": 300, "vith16plus": 840, "vit7b16": 6716}


def on_meta(name: str) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(BACKBONES[name])


def shapes(state) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is a weight; masks and periods are computed."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not DERIVED.match(name)}


@pytest.mark.parametrize("name", sorted(PUBLISHED_MILLIONS))
def test_size__is_the_published_one(name):
    count = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.03)


@pytest.mark.parametrize("name", RELEASED)
def test_official_file__its_architecture_is_told_by_its_tensors(name):
    state = on_meta(name).state_dict()
    head_dim = BACKBONES[name].embed_dim // BACKBONES[name].num_heads
    # The only values that are looked at: they tell the number of heads and the base.
    state["rope_embed.periods"] = 100.0 ** (2 * torch.arange(head_dim // 4) / (head_dim / 2))
    assert detect_layout(state) == "official"
    assert backbone_name(architecture_of(state, name)) == name


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("has_bias", [True, False])
def test_timm__has_the_same_tensors(name, has_bias):
    timm = pytest.importorskip("timm")
    if BACKBONES[name].untie_global_and_local_cls_norm and has_bias:
        pytest.skip("the 7B model has no bias")
    architecture, arguments = timm_model(BACKBONES[name], has_bias)
    with torch.device("meta"):
        theirs = to_official(timm.create_model(architecture, **arguments).state_dict(), "timm")
        ours = VisionTransformer(BACKBONES[name].model_copy(update={"qkv_bias": has_bias}))
    expected = shapes(ours.state_dict())
    # timm has nothing that is for training only.
    for training_only in ("mask_token", "local_cls_norm.weight", "local_cls_norm.bias"):
        expected.pop(training_only, None)
    found = {key: (tuple(ours.get_parameter(key).shape) if "token" in key else shape) for key, shape in shapes(theirs).items()}
    assert found == expected


@pytest.mark.parametrize("name", RELEASED)
def test_transformers__has_the_same_tensors(name):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**transformers_config(BACKBONES[name])))
        theirs = shapes(to_official(model.state_dict(), "transformers"))
    expected = shapes(on_meta(name).state_dict())
    for training_only in ("local_cls_norm.weight", "local_cls_norm.bias"):
        expected.pop(training_only, None)
    assert theirs == expected
