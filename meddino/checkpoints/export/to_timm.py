"""A file that timm loads: `timm.create_model("vit_base_patch16_dinov3", checkpoint_path=...)`."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meddino.checkpoints.export.comparison import all_tokens, check_other_library
from meddino.checkpoints.export.foreign_options import ForeignOptions, need, quiet
from meddino.checkpoints.export.model import Model
from meddino.checkpoints.export.model_folder import WEIGHTS_FILE, write_weights
from meddino.checkpoints.weights.infer_architecture import RELEASED_NORM_EPS
from meddino.checkpoints.weights.key_formats import to_timm
from meddino.core.errors import CheckpointError
from meddino.core.files import write_json, write_text
from meddino.data.intensity import MEMBERS
from meddino.models.timm_backbone import TimmBackbone
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

# Released sizes -> timm's name; `_qkvb` follows where the weights have a bias of queries and values.
_NAMES = {
    (384, 12, 6, "mlp"): "vit_small_patch16_dinov3",
    (384, 12, 6, "swiglu"): "vit_small_plus_patch16_dinov3",
    (768, 12, 12, "mlp"): "vit_base_patch16_dinov3",
    (1024, 24, 16, "mlp"): "vit_large_patch16_dinov3",
    (1280, 32, 20, "swiglu"): "vit_huge_plus_patch16_dinov3",
}


def export_timm(folder: Path, model: Model, options: ForeignOptions) -> None:
    """Write model.safetensors, config.json and README.md; load them with timm and compare.

    Args:
        folder: Exists and is empty.
        model: The source.
        options: What to compare on, and the data type.

    Raises:
        CheckpointError: timm's model cannot hold the architecture, or computes something else.
    """
    need(["timm"], "timm")
    backbone = model.backbone
    norm_eps = RELEASED_NORM_EPS
    if isinstance(backbone, TimmBackbone):
        tensors = backbone.model.state_dict()
        name, arguments = backbone.config.timm, dict(backbone.config.arguments)
    else:
        if not isinstance(backbone, VisionTransformer):
            raise CheckpointError(f"timm has no model for a {type(backbone).__name__}; leave timm out of --to")
        tensors = to_timm(_without_zero_bias(backbone.state_dict()), backbone.config)
        name, arguments = timm_model(backbone.config, has_bias="blocks.0.attn.q_bias" in tensors)
        norm_eps = backbone.config.norm_eps
    write_weights(folder / WEIGHTS_FILE, {key: _in_dtype(tensor, options.dtype) for key, tensor in tensors.items()})
    # timm reads this as `local-dir:`; LayerNorm's epsilon is a function there and no JSON.
    contract = model.contract
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [contract.channels, 256, 256],
            "mean": list(contract.channel_mean),
            "std": list(contract.channel_std),
            "license": model.lineage.licence,
        },
    }
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", _readme(name, arguments, model, norm_eps))
    with quiet("timm"):
        loaded = load_timm(folder / WEIGHTS_FILE, name, arguments, norm_eps)
    for stored in options.slices:
        images = model.preprocess(stored)
        with torch.no_grad():
            found = loaded.forward_features(images)  # type: ignore[operator]
            own = backbone.model.forward_features if isinstance(backbone, TimmBackbone) else partial(all_tokens, model)
            expected = own(images)  # type: ignore[operator]
        check_other_library([expected], [found], "timm", f"tokens at {list(stored.shape[-2:])} px")


def timm_model(vit: ViTConfig, has_bias: bool) -> tuple[str, dict[str, Any]]:
    """Return timm's name for an architecture and the arguments that differ from that name's own."""
    kind = "mlp" if vit.ffn_layer == "mlp" else "swiglu"
    known = _NAMES.get((vit.embed_dim, vit.depth, vit.num_heads, kind))
    name = (known or "vit_base_patch16_dinov3") + ("_qkvb" if has_bias else "")
    arguments: dict[str, Any] = {}
    if known is None:
        arguments = {"embed_dim": vit.embed_dim, "depth": vit.depth, "num_heads": vit.num_heads}
        if kind == "swiglu":
            arguments |= {"swiglu_mlp": True, "swiglu_align_to": 8}
    ratio = vit.ffn_ratio if kind == "mlp" else vit.ffn_ratio * 2 / 3
    if ratio != 4:
        arguments["mlp_ratio"] = ratio
    defaults = {"patch_size": 16, "in_chans": 3, "num_reg_tokens": 4, "rope_temperature": 100.0}
    own = {
        "patch_size": vit.patch_size,
        "in_chans": vit.in_chans,
        "num_reg_tokens": vit.num_registers,
        "rope_temperature": vit.rope_base,
    }
    arguments |= {key: value for key, value in own.items() if value != defaults[key]}
    if vit.layerscale_init is None:
        arguments["init_values"] = None
    return name, arguments


def load_timm(weights: Path, name: str, arguments: dict[str, Any], norm_eps: float) -> nn.Module:
    """Load a file with timm as a user would; strict."""
    import timm

    extra: dict[str, Any] = {} if norm_eps == RELEASED_NORM_EPS else {"norm_layer": partial(nn.LayerNorm, eps=norm_eps)}
    if not name.partition("_qkvb")[0].endswith("_dinov3"):
        extra["num_classes"] = 0
    model: nn.Module = timm.create_model(name, checkpoint_path=str(weights), **arguments, **extra)
    return model.eval()


def _without_zero_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out biases of queries and values that are zero everywhere, so that the shorter name's model takes the file."""
    names = [name for name in tensors if name.endswith("attn.qkv.bias")]
    if any(tensors[name].any() for name in names):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _readme(name: str, arguments: dict[str, Any], model: Model, norm_eps: float) -> str:
    contract = model.contract
    words = [f'"{name}"', f'checkpoint_path="{WEIGHTS_FILE}"', *(f"{key}={value!r}" for key, value in arguments.items())]
    if isinstance(model.backbone, TimmBackbone):
        words.append("num_classes=0")
    if norm_eps != RELEASED_NORM_EPS:
        words.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={norm_eps!r})")
    told = "" if isinstance(model.backbone, TimmBackbone) else "  # CLS, registers, patches"
    lines = [
        "# For timm",
        "",
        "```python",
        "import functools, timm, torch",
        "",
        f"model = timm.create_model({', '.join(words)}).eval()",
        f"mean = torch.tensor({list(contract.channel_mean)}).view(-1, 1, 1)",
        f"std = torch.tensor({list(contract.channel_std)}).view(-1, 1, 1)",
        f"images = (stored.clamp{contract.shown_range}[:, None].repeat(1, {contract.channels}, 1, 1) - mean) / std",
        f"tokens = model.forward_features(images){told}",
        "```",
        "",
        f"`stored` is [batch, rows, columns]: {MEMBERS[contract.modality].given}. Licence and lineage: ../MODEL_CARD.md.",
    ]
    return "\n".join(lines) + "\n"
