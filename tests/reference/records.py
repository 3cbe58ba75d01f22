"""Reading a folder of records."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from meddino.models.vision_transformer import ViTConfig
from tests.reference.report import RecordsError

# Arguments of the published constructor that have another name here.
RENAMED = {
    "n_storage_tokens": "num_registers",
    "registers": "num_registers",
    "pos_embed_rope_base": "rope_base",
    "pos_embed_rope_normalize_coords": "rope_normalise",
    "pos_embed_rope_shift_coords": "rope_shift",
    "pos_embed_rope_jitter_coords": "rope_jitter",
    "pos_embed_rope_rescale_coords": "rope_rescale",
    "pos_embed_rope_dtype": "rope_dtype",
    "drop_path_rate": "drop_path",
}
# What the published constructor takes where nothing is said.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "num_registers": 0,
    "mask_k_bias": False,
    "layerscale_init": None,
    "rope_dtype": "bf16",
    "norm_eps": 1e-6,
}
NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
WITHOUT_EFFECT = {"img_size", "device"}
ALWAYS_TRUE = {"ffn_bias", "proj_bias"}
FLOATS = {"ffn_ratio", "rope_base", "rope_shift", "rope_jitter", "rope_rescale", "drop_path", "layerscale_init", "norm_eps"}
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "ten": 10}


@dataclass(frozen=True)
class Records:
    """A folder with records.json and the safetensors files it names."""

    folder: Path
    described: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> "Records":
        """Read the description.

        Raises:
            RecordsError: If there is no records.json, or it is no JSON object.
        """
        try:
            described = json.loads((folder / "records.json").read_text())
        except (OSError, ValueError) as error:
            raise RecordsError(f"{folder} holds no readable records.json: {error}") from error
        if not isinstance(described, dict):
            raise RecordsError(f"{folder}/records.json is no JSON object")
        return Records(folder, described)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file.

        Raises:
            RecordsError: If the file is missing.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise RecordsError(f"{self.folder}/records.json describes '{name}', and {path.name} is missing")
        return load_file(path)

    def backbones(self) -> list[str]:
        """Return the names of the recorded backbones."""
        return [name for name in self.described if name.startswith("backbone")]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def published_config(arguments: dict[str, Any]) -> ViTConfig:
    """Return our config for the published constructor's arguments.

    Raises:
        RecordsError: If an argument means nothing here.
    """
    fields: dict[str, Any] = dict(PUBLISHED_DEFAULTS)
    for name, value in arguments.items():
        if name in WITHOUT_EFFECT or (name in ALWAYS_TRUE and value):
            continue
        if name == "norm_layer":
            fields["norm_eps"] = NORM_EPS[value]
            continue
        ours = RENAMED.get(name, name)
        if ours not in ViTConfig.model_fields:
            raise RecordsError(f"backbone argument '{name}' = {value!r} is unknown here")
        fields[ours] = value
    return ViTConfig(**{name: _number(name, value) for name, value in fields.items()})


def config_of_weights(weights: dict[str, Tensor], described: dict[str, Any]) -> ViTConfig:
    """Return the config of a training step's backbone: what the description says, the rest from the weights' shapes."""
    dim, channels, side, _ = weights["patch_embed.proj.weight"].shape
    gated = "blocks.0.mlp.w1.weight" in weights
    hidden = weights["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0]
    periods = str(weights["rope_embed.periods"].dtype)
    fields: dict[str, Any] = {
        "embed_dim": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "patch_size": side,
        "in_chans": channels,
        "num_registers": weights["storage_tokens"].shape[1] if "storage_tokens" in weights else 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in weights,
        "layerscale_init": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "rope_dtype": {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[periods],
        "untie_cls_and_patch_norms": "cls_norm.weight" in weights,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in weights,
        # A hair above, so that the width comes out again after int() and SwiGLU's two thirds.
        "ffn_ratio": (hidden * 1.5 + 1e-3) / dim if gated else hidden / dim,
        "ffn_layer": "swiglu" if gated else "mlp",
    }
    known = {RENAMED.get(name, name): value for name, value in described.items()}
    for name in ("num_heads", "rope_base", "rope_normalise", "norm_eps", "drop_path"):
        if name in known:
            fields[name] = known[name]
    if "norm_layer" in described:
        fields["norm_eps"] = NORM_EPS[described["norm_layer"]]
    return ViTConfig(**{name: _number(name, value) for name, value in fields.items()})


def stated(described: dict[str, Any], key: str, text: str, default: float) -> float:
    """Return a number that is given under a key, or in the sentence under "what", or a default.

    Args:
        described: One entry of records.json.
        key: Where the number stands by itself.
        text: Regular expression with one group, for the sentence.
        default: Where neither says anything.
    """
    if key in described:
        return float(described[key])
    found = re.search(text, str(described.get("what", "")))
    if found is None:
        return default
    return float(WORDS.get(found.group(1).lower(), found.group(1)))


def _number(name: str, value: Any) -> Any:
    return float(value) if name in FLOATS and isinstance(value, int) and not isinstance(value, bool) else value
