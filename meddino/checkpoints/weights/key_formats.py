"""One backbone under three sets of names: official (ours), timm's and transformers'. Both directions."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from meddino.core.errors import CheckpointError
from meddino.models.vision_transformer import ViTConfig

Layout = Literal["official", "timm", "transformers"]

# Whole names and parts of names inside a block, official on the left; timm's SwiGLU is handled below.
_TIMM = {"storage_tokens": "reg_token"}
_TIMM_BLOCK = {
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
_TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
}
_TRANSFORMERS_BLOCK = {
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
}
# What is computed from the architecture and is no weight.
DERIVED = re.compile(r"(.*\.)?(bias_mask|rope_embed\.periods|inv_freq|periods)$")


def detect_layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """Return the naming of a DINOv3 backbone, or None if it is none of them."""
    if "patch_embed.proj.weight" in tensors and "pos_embed" not in tensors:
        if any(name in tensors for name in ("blocks.0.gamma_1", "reg_token", "blocks.0.attn.q_bias")):
            return "timm"
        if "blocks.0.attn.qkv.weight" in tensors or any(name.startswith("rope_embed") for name in tensors):
            return "official"
    if any(name.startswith("embeddings.patch_embeddings.") for name in tensors) and any(
        ".attention.q_proj.weight" in name for name in tensors
    ):
        return "transformers"
    return None


def to_official(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the tensors under official names; names that have no counterpart stay as they are."""
    if layout == "timm":
        return _from_timm(tensors)
    if layout == "transformers":
        return _from_transformers(tensors)
    # Where a mask holds the keys' bias at zero, the bias that counts is zero there.
    return {
        name: _effective_bias(tensors, name) if name.endswith("attn.qkv.bias") else tensor for name, tensor in tensors.items()
    }


def to_timm(tensors: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Return official weights under timm's names (its Eva class).

    Raises:
        CheckpointError: The architecture has a part that timm's model does not.
    """
    _check_representable(tensors, config, "timm")
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if DERIVED.match(name) or name == "mask_token" or name.startswith("local_cls_norm."):
            continue  # computed there, or for training only
        if name.endswith("attn.qkv.bias"):
            query, key, value = _effective_bias(tensors, name).chunk(3)
            if key.any():
                raise CheckpointError(f"{name}: its keys' bias is not zero, and timm's DINOv3 has none; export to hf or onnx")
            result[name.replace("qkv.bias", "q_bias")] = query.clone()
            result[name.replace("qkv.bias", "v_bias")] = value.clone()
            continue
        renamed = _renamed(name, _TIMM, _TIMM_BLOCK, "blocks", "blocks")
        result[renamed] = tensor
    return result


def to_transformers(tensors: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Return official weights under the names of transformers' DINOv3ViTModel.

    Raises:
        CheckpointError: The architecture has a part that transformers' model does not.
    """
    _check_representable(tensors, config, "transformers")
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if DERIVED.match(name) or name.startswith("local_cls_norm."):
            continue
        if ".attn.qkv." in name:
            parts = (_effective_bias(tensors, name) if name.endswith("bias") else tensor).chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                if letter == "k" and name.endswith("bias") and config.mask_k_bias:
                    continue
                new = _renamed(name.replace("attn.qkv", f"attention.{letter}_proj"), {}, {}, "blocks", "layer")
                result[new] = part.clone()
            continue
        result[_renamed(name, _TRANSFORMERS, _TRANSFORMERS_BLOCK, "blocks", "layer")] = tensor
    result["embeddings.mask_token"] = result["embeddings.mask_token"].reshape(1, 1, -1)
    if config.num_registers == 0:
        result["embeddings.register_tokens"] = tensors["cls_token"].new_zeros(1, 0, config.embed_dim)
    if config.layerscale_init is None:  # transformers always multiplies: by one, then
        for block in range(config.depth):
            for scale in ("layer_scale1", "layer_scale2"):
                result[f"layer.{block}.{scale}.lambda1"] = tensors["cls_token"].new_ones(config.embed_dim)
    return result


def _from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.fc1_g." in name for name in tensors)
    whole = {new: old for old, new in _TIMM.items()}
    block = {new: old for old, new in _TIMM_BLOCK.items() if gated or not old.startswith("mlp.")}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("attn.q_bias"):
            value = tensors.get(name.replace("q_bias", "v_bias"))
            if value is not None:
                result[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif not name.endswith(("attn.v_bias", "attn.k_bias")):
            result[_renamed(name, whole, block, "blocks", "blocks")] = tensor
    return result


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.gate_proj." in name for name in tensors)
    whole = {new: old for old, new in _TRANSFORMERS.items()}
    wanted = ("mlp.w", "attn", "ls") if gated else ("mlp.fc", "attn", "ls")
    block = {new: old for old, new in _TRANSFORMERS_BLOCK.items() if old.startswith(wanted)}
    result: dict[str, Tensor] = {}
    for raw, tensor in tensors.items():
        name = raw.removeprefix("dinov3_vit.")
        name = re.sub(r"^(model|encoder)\.(?=layer\.)", "", name)
        if ".attention.q_proj." in name:
            result |= _joined_qkv(tensors, raw, name, tensor)
        elif ".attention.k_proj." not in name and ".attention.v_proj." not in name:
            result[_renamed(name, whole, block, "layer", "blocks")] = tensor
    if "mask_token" in result:
        result["mask_token"] = result["mask_token"].reshape(1, -1)
    if "storage_tokens" in result and not result["storage_tokens"].shape[1]:
        del result["storage_tokens"]
    return result


def _joined_qkv(tensors: Mapping[str, Tensor], raw: str, name: str, query: Tensor) -> dict[str, Tensor]:
    key = tensors.get(raw.replace("q_proj", "k_proj"))
    value = tensors.get(raw.replace("q_proj", "v_proj"))
    new = _renamed(name.replace("attention.q_proj", "attn.qkv"), {}, {}, "layer", "blocks")
    if value is None or (key is None and name.endswith("weight")):
        return {}  # missing parts show up in the coverage report
    # The keys' bias is absent where it is held at zero.
    return {new: torch.cat([query, torch.zeros_like(query) if key is None else key, value])}


def _renamed(name: str, whole: Mapping[str, str], block: Mapping[str, str], from_list: str, to_list: str) -> str:
    if name in whole:
        return whole[name]
    match = re.match(rf"{from_list}\.(\d+)\.(.+)$", name)
    if match is None:
        return name
    inside = match[2]
    for old, new in block.items():
        if inside == old or inside.startswith(f"{old}."):
            inside = new + inside[len(old) :]
            break
    return f"{to_list}.{match[1]}.{inside}"


def _effective_bias(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    bias = tensors[name]
    if f"{name}_mask" not in tensors:
        return bias
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _check_representable(tensors: Mapping[str, Tensor], config: ViTConfig, library: str) -> None:
    reasons = []
    if config.untie_cls_and_patch_norms:
        reasons.append("a LayerNorm of its own for CLS and registers")
    if config.rope_normalise != "separate":
        reasons.append(f"rope_normalise '{config.rope_normalise}'")
    if config.rope_dtype != "fp32":
        reasons.append(f"rotary embedding in {config.rope_dtype}")
    if not any(name.endswith("ls1.gamma") for name in tensors) and config.layerscale_init is not None:
        reasons.append("LayerScale in the config but not in the weights")
    if reasons:
        raise CheckpointError(f"{library}'s DINOv3 cannot hold this architecture: {'; '.join(reasons)}; export to onnx instead")
