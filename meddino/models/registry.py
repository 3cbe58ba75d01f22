"""Backbones by name."""

import difflib
from typing import Any

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.models.backbone import Backbone
from meddino.models.timm_backbone import TIMM_PREFIX, TimmBackbone, TimmConfig, timm_config
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

BackboneConfig = ViTConfig | TimmConfig


def _released(embed_dim: int, depth: int, num_heads: int, **changes: Any) -> ViTConfig:
    # The released models are built with LayerNorm's epsilon at 1e-5; training rescaled RoPE's coordinates by up to 2.
    return ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=num_heads, norm_eps=1e-5, rope_rescale=2.0, **changes)


BACKBONES: dict[str, ViTConfig] = {
    "vits16": _released(384, 12, 6),
    "vits16plus": _released(384, 12, 6, ffn_layer="swiglu", ffn_ratio=6.0),
    "vitb16": _released(768, 12, 12),
    "vitl16": _released(1024, 24, 16),
    "vitl16plus": _released(1024, 24, 16, ffn_layer="swiglu", ffn_ratio=6.0),
    "vith16plus": _released(1280, 32, 20, ffn_layer="swiglu", ffn_ratio=6.0),
    "vit7b16": _released(
        4096, 40, 32, ffn_layer="swiglu64", ffn_ratio=3.0, qkv_bias=False, untie_global_and_local_cls_norm=True
    ),
    # Small ones of our own, for machines without an accelerator.
    "vitt16": ViTConfig(embed_dim=192, depth=12, num_heads=3, rope_rescale=2.0),
    "vitnano8": ViTConfig(embed_dim=128, depth=4, num_heads=4, patch_size=8, rope_rescale=2.0),
}


def backbone_config(name: str, **changes: Any) -> BackboneConfig:
    """Return the architecture behind a name.

    Args:
        name: A key of `BACKBONES`, or `timm:<name>` for any model of timm.
        changes: Fields of `ViTConfig` to set differently; of a timm model, arguments of timm.create_model.

    Raises:
        ConfigError: If the name or a changed field is unknown; the nearest known one is named.
    """
    if name.startswith(TIMM_PREFIX):
        return timm_config(name.removeprefix(TIMM_PREFIX), **changes)
    return vit_config(name, **changes)


def vit_config(name: str, **changes: Any) -> ViTConfig:
    """Return the vision transformer behind a key of `BACKBONES`; see `backbone_config`."""
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"unknown backbone '{name}'; {hint}known: {', '.join(BACKBONES)}, {TIMM_PREFIX}<a timm name>")
    if not changes:
        return BACKBONES[name]
    return check_config(ViTConfig, {**BACKBONES[name].model_dump(mode="json"), **changes}, where=f"of backbone '{name}'")


def build_backbone(name: str, **changes: Any) -> Backbone:
    """Build a backbone with fresh weights; see `backbone_config`."""
    return backbone_from_config(backbone_config(name, **changes))


def backbone_from_config(config: BackboneConfig) -> Backbone:
    """Build the architecture that a backbone's own `config` describes, with fresh weights."""
    return TimmBackbone(config) if isinstance(config, TimmConfig) else VisionTransformer(config)


def tapped_blocks(depth: int, count: int = 4) -> tuple[int, ...]:
    """Return the blocks whose patch tokens dense tasks read: evenly spaced, the last one included.

    Args:
        depth: Number of blocks.
        count: How many to tap; at most `depth`.

    Returns:
        Block numbers from 0: (2, 5, 8, 11) at depth 12, (0, 1, 2, 3) at depth 4.

    Raises:
        ValueError: If `count` is not in [1, depth].
    """
    if not 1 <= count <= depth:
        raise ValueError(f"cannot tap {count} blocks of {depth}; choose between 1 and {depth}")
    return tuple(round(depth * (number + 1) / count) - 1 for number in range(count))
