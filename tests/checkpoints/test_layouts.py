"""Real layouts, rebuilt with random weights by timm and transformers: read, computed alike, and written back."""

import pytest
import torch
from torch import nn

from meddino.checkpoints.export.comparison import check_sizes
from meddino.checkpoints.weights.key_formats import detect_layout, to_official, to_timm, to_transformers
from meddino.core.errors import CheckpointError
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
SHAPE = {"embed_dim": 64, "depth": 3, "num_heads": 4, "norm_eps": 1e-5}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 if "gamma" in name or "lambda" in name else 0.15
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
                parameter.add_(1.0)
    return module.eval()


def images(patch: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(2, 3, *size, generator=generator) for size in check_sizes(patch)]


def timm_model(**changes) -> nn.Module:
    arguments = {"embed_dim": 64, "depth": 3, "num_heads": 4, **changes}
    return randomised(timm.create_model("vit_base_patch16_dinov3", **arguments))


def transformers_model(**changes) -> nn.Module:
    arguments = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256, **changes}
    config = transformers.DINOv3ViTConfig(num_register_tokens=arguments.pop("num_register_tokens", 4), **arguments)
    return randomised(transformers.DINOv3ViTModel(config))


def ours(tensors: dict[str, torch.Tensor], **config) -> VisionTransformer:
    model = VisionTransformer(ViTConfig(**{**SHAPE, **config})).eval()
    incomplete = model.load_state_dict(tensors, strict=False)
    assert not incomplete.unexpected_keys
    assert all("bias_mask" in name or "periods" in name or name == "mask_token" for name in incomplete.missing_keys)
    return model


def tokens(model: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return torch.cat([output.cls_token[:, None], output.register_tokens, output.patch_tokens], dim=1)


TIMM_CASES = {
    "plain": ({}, {"qkv_bias": False}),
    "qkv_bias": ({"qkv_bias": True}, {"qkv_bias": True}),
    "swiglu": ({"swiglu_mlp": True, "swiglu_align_to": 8}, {"qkv_bias": False, "ffn_layer": "swiglu", "ffn_ratio": 6.0}),
    "no_registers": ({"num_reg_tokens": 0}, {"qkv_bias": False, "num_registers": 0}),
    "patch_8": ({"patch_size": 8}, {"qkv_bias": False, "patch_size": 8}),
}


@pytest.mark.parametrize("case", TIMM_CASES)
@torch.no_grad()
def test_timm__same_tokens_and_back(case):
    arguments, config = TIMM_CASES[case]
    model = timm_model(**arguments)
    state = model.state_dict()
    assert detect_layout(state) == "timm"
    official = to_official(state, "timm")
    assert detect_layout(official) == "official"
    backbone = ours(official, **config)
    for x in images(config.get("patch_size", 16)):
        assert (tokens(backbone, x) - model.forward_features(x)).abs().max() <= TOLERANCE
    back = to_timm(backbone.state_dict(), backbone.config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


TRANSFORMERS_CASES = {
    "released": ({}, {}),
    "swiglu": (
        {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 256},
        {"ffn_layer": "swiglu", "ffn_ratio": 6.0},
    ),
    "no_bias": ({"query_bias": False, "value_bias": False}, {"qkv_bias": False}),
    "keys_bias": ({"key_bias": True}, {"mask_k_bias": False}),
    "no_registers": ({"num_register_tokens": 0}, {"num_registers": 0}),
}


@pytest.mark.parametrize("case", TRANSFORMERS_CASES)
@torch.no_grad()
def test_transformers__same_tokens_and_back(case):
    arguments, config = TRANSFORMERS_CASES[case]
    model = transformers_model(**arguments)
    state = model.state_dict()
    assert detect_layout(state) == "transformers"
    backbone = ours(to_official(state, "transformers"), **config)
    for x in images():
        assert (tokens(backbone, x) - model(pixel_values=x).last_hidden_state).abs().max() <= TOLERANCE
    back = to_transformers(backbone.state_dict(), backbone.config)
    on_disk = {name.replace("model.layer.", "layer."): value for name, value in state.items()}
    assert back.keys() == on_disk.keys() and all(torch.equal(back[name], on_disk[name]) for name in back)


def test_official__a_masked_keys_bias_counts_as_zero():
    model = randomised(VisionTransformer(ViTConfig(**SHAPE)))
    official = to_official(model.state_dict(), "official")
    bias = official["blocks.0.attn.qkv.bias"]
    assert not bias[64:128].any() and bias[:64].all() and bias[128:].all()


def test_not_representable__is_refused_with_the_reason():
    untied = VisionTransformer(ViTConfig(**SHAPE, untie_cls_and_patch_norms=True))
    with pytest.raises(CheckpointError, match=r"timm's DINOv3 cannot hold .* LayerNorm of its own .* export to onnx"):
        to_timm(untied.state_dict(), untied.config)
    with pytest.raises(CheckpointError, match="transformers's DINOv3 cannot hold"):
        to_transformers(untied.state_dict(), untied.config)
    free = randomised(VisionTransformer(ViTConfig(**SHAPE, mask_k_bias=False)))
    with pytest.raises(CheckpointError, match="keys' bias is not zero"):
        to_timm(free.state_dict(), free.config)


def test_detect__others_are_none_of_them():
    resnet = {"layer1.0.conv1.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}
    assert detect_layout(resnet) is None
    assert detect_layout({"pos_embed": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(1)}) is None
