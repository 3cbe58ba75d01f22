"""What a file's tensors, or a transformers config.json, say about the architecture."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meddino.core.config import check_config
from meddino.core.errors import CheckpointError, ConfigError
from meddino.layers.feed_forward import SWIGLU_MULTIPLES, SwiGLU, build_feed_forward
from meddino.models.registry import BACKBONES
from meddino.models.vision_transformer import ViTConfig

# Neither eps nor the augmentation in training is in a file; these are the released models'.
RELEASED_NORM_EPS = 1e-5


def architecture_of(tensors: Mapping[str, Tensor], where: str, num_heads: int | None = None) -> ViTConfig:
    """Return the architecture of a backbone under official names.

    Args:
        tensors: From `to_official`.
        where: Named in errors.
        num_heads: Attention heads of the model they are for, where it is known: no weight's shape tells them, only the
            rotary periods do, which timm's files lack.

    Raises:
        CheckpointError: The tensors do not tell (for example the number of heads at an unusual width).
    """
    try:
        dim, channels, patch = (tensors["patch_embed.proj.weight"].shape[index] for index in (0, 1, 2))
        numbers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
        values: dict[str, Any] = {
            "embed_dim": dim,
            "depth": max(numbers) + 1,
            "num_heads": _heads(tensors, dim, where, num_heads),
            "patch_size": patch,
            "in_chans": channels,
            "num_registers": tensors["storage_tokens"].shape[1] if "storage_tokens" in tensors else 0,
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
            "mask_k_bias": "blocks.0.attn.qkv.bias" not in tensors or _keys_bias_is_held_at_zero(tensors),
            "layerscale_init": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
            "norm_eps": RELEASED_NORM_EPS,
            "untie_cls_and_patch_norms": "cls_norm.weight" in tensors,
            "untie_global_and_local_cls_norm": "local_cls_norm.weight" in tensors,
            "rope_base": _rope_base(tensors),
            "rope_rescale": 2.0,
            **_feed_forward(tensors, dim),
        }
        return check_config(ViTConfig, values, where=where)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} holds no complete DINOv3 backbone: {error} is missing") from error
    except ConfigError as error:
        raise CheckpointError(f"{where}: no architecture fits its tensors: {error}") from error


def architecture_from_transformers(config: Mapping[str, Any], where: str) -> ViTConfig:
    """Return the architecture that a transformers config.json of a DINOv3 ViT describes.

    Raises:
        CheckpointError: It is of another model, or of a variant that we do not have.
    """
    if config.get("model_type") != "dinov3_vit":
        raise CheckpointError(
            f"{where} is of model_type '{config.get('model_type')}', not 'dinov3_vit'; other models can be evaluated: "
            "meddino-eval --model hf:<folder>"
        )
    try:
        dim, hidden = config["hidden_size"], config["intermediate_size"]
        query, key, value = (config.get(f"{part}_bias", part != "key") for part in ("query", "key", "value"))
        if query != value or not config.get("proj_bias", True) or not config.get("mlp_bias", True):
            raise CheckpointError(f"{where}: biases of queries and values differ, or of projections are absent; not supported")
        gated = bool(config.get("use_gated_mlp", False))
        values = {
            "embed_dim": dim,
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "patch_size": config.get("patch_size", 16),
            "in_chans": config.get("num_channels", 3),
            "num_registers": config.get("num_register_tokens", 0),
            "qkv_bias": bool(query),
            "mask_k_bias": not key,
            "norm_eps": config.get("layer_norm_eps", RELEASED_NORM_EPS),
            "rope_base": float(config.get("rope_theta", _nested_theta(config))),
            "rope_rescale": config.get("pos_embed_rescale"),
            "rope_jitter": config.get("pos_embed_jitter"),
            "rope_shift": config.get("pos_embed_shift"),
            "ffn_layer": "swiglu" if gated else "mlp",
            "ffn_ratio": _ratio(dim, hidden) if gated else hidden / dim,
        }
        return check_config(ViTConfig, values, where=where)
    except KeyError as error:
        raise CheckpointError(f"{where} has no {error}; it is no complete config.json of a DINOv3 model") from error
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def backbone_name(config: ViTConfig) -> str:
    """Return the registry's name of an architecture, or "custom"; what matters in training only is not compared."""
    training = {
        "rope_shift",
        "rope_jitter",
        "rope_rescale",
        "drop_path",
        "layerscale_init",
        "norm_eps",
        "mask_k_bias",
        "qkv_bias",
        "ffn_layer",
        "ffn_ratio",
    }

    def compared(some: ViTConfig) -> tuple[object, ...]:
        with torch.device("meta"):
            feed_forward = build_feed_forward(some.ffn_layer, some.embed_dim, some.ffn_ratio)
        # Several kinds and ratios give one and the same perceptron.
        shapes = {name: tensor.shape for name, tensor in feed_forward.state_dict().items()}
        return some.model_dump(exclude=training), shapes

    wanted = compared(config)
    return next((name for name, known in BACKBONES.items() if compared(known) == wanted), "custom")


def _heads(tensors: Mapping[str, Tensor], dim: int, where: str, wanted: int | None) -> int:
    if "rope_embed.periods" in tensors:
        return int(dim // (4 * tensors["rope_embed.periods"].numel()))
    if wanted is not None:
        return wanted
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    known = {known.num_heads for known in BACKBONES.values() if (known.embed_dim, known.depth) == (dim, depth)}
    if len(known) == 1:
        return known.pop()
    raise CheckpointError(
        f"{where}: the number of attention heads is not in the file (width {dim}, {depth} blocks is no released size); "
        "give the backbone's name or config"
    )


def _rope_base(tensors: Mapping[str, Tensor]) -> float:
    periods = tensors.get("rope_embed.periods")
    if periods is None or periods.numel() < 2:
        return 100.0
    # The longest period is base ** ((n - 1) / n); in bf16 it is known to half a per cent.
    base = float(periods.float()[-1]) ** (periods.numel() / (periods.numel() - 1))
    return 100.0 if abs(base - 100.0) < 2.0 else round(base, 2)


def _keys_bias_is_held_at_zero(tensors: Mapping[str, Tensor]) -> bool:
    if "blocks.0.attn.qkv.bias_mask" in tensors:
        return True
    return not any(value.chunk(3)[1].any() for name, value in tensors.items() if name.endswith("attn.qkv.bias"))


def _feed_forward(tensors: Mapping[str, Tensor], dim: int) -> dict[str, Any]:
    if "blocks.0.mlp.w1.weight" in tensors:
        return {"ffn_layer": "swiglu", "ffn_ratio": _ratio(dim, tensors["blocks.0.mlp.w1.weight"].shape[0])}
    return {"ffn_layer": "mlp", "ffn_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim}


def _ratio(dim: int, hidden: int) -> float:
    """Return a ratio under which SwiGLU gets this hidden width (two thirds of it, rounded up to a multiple)."""
    for ratio in (round(1.5 * hidden / dim, 6), (1.5 * hidden + 1) / dim, (1.5 * hidden - 0.5) / dim):
        with torch.device("meta"):
            feed_forward = build_feed_forward("swiglu", dim, ratio)
        assert isinstance(feed_forward, SwiGLU)
        if feed_forward.w1.out_features == hidden:
            return ratio
    raise CheckpointError(f"SwiGLU of hidden width {hidden} at width {dim}: not a multiple of {min(SWIGLU_MULTIPLES.values())}")


def _nested_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters")
    return float(parameters.get("rope_theta", 100.0)) if isinstance(parameters, Mapping) else 100.0
