"""A DINOv3 backbone in any file or folder, told by content, under official names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from meddino.checkpoints.export.model_folder import DINOV3_LICENCE, Architecture, ParentRecord, is_model_folder, read_record
from meddino.checkpoints.export.source import HEADS, find_checkpoint, read_source
from meddino.checkpoints.state.names import META_FILE, list_checkpoints
from meddino.checkpoints.weights.distcp import is_distcp_folder
from meddino.checkpoints.weights.infer_architecture import architecture_from_transformers, architecture_of
from meddino.checkpoints.weights.key_formats import DERIVED, detect_layout, to_official
from meddino.checkpoints.weights.weight_files import SHARD_INDEXES, read_sharded_folder, read_weights_file
from meddino.core.errors import CheckpointError
from meddino.core.files import sha256_file
from meddino.models.vision_transformer import ViTConfig

TIMM_PREFIX = "timm:"
_CHUNKED = re.compile(r"^blocks\.\d+\.(?=\d+\.)(\d+)\.")  # of DINOv2's block_chunks, the second number counts on


@dataclass(frozen=True)
class FoundWeights:
    """A backbone as it was found, under official names, before it is fitted to a model.

    Attributes:
        config: The architecture, as far as the source tells.
        parent: Name, checksum and licence, for the lineage of what is trained from it.
        heads: "dino_head", "ibot_head" -> weights, where the file has them.
    """

    tensors: dict[str, Tensor]
    layout: str
    config: ViTConfig
    parent: ParentRecord
    heads: dict[str, dict[str, Tensor]]
    other_parts: dict[str, int]
    notes: list[str]
    source: str


def find_weights(source: str | Path, section: str | None = None, num_heads: int | None = None) -> FoundWeights:
    """Read a backbone from a file or folder, told by its content.

    Args:
        source: An official DINOv3 file, a DINOv3 or MedDINOv3 trainer's file, a timm or transformers state dict, plain
            safetensors; a transformers folder; our exports, training checkpoints and runs; `timm:<name>` for pretrained
            weights that timm has downloaded earlier, or `timm:<name>@<file>`.
        section: Of a trainer's file: which network.
        num_heads: See `architecture_of`.

    Raises:
        CheckpointError: It cannot be read, or is of another kind of model.
    """
    text = str(source)
    if text.startswith(TIMM_PREFIX):
        name, _, place = text.removeprefix(TIMM_PREFIX).partition("@")
        path = Path(place) if place else _cached_timm_file(name)
    else:
        path = Path(source)
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; nothing is downloaded: docs/weights.md says where files are published")
    if path.is_dir():
        return _from_folder(path, section, num_heads)
    file = read_weights_file(path, section)
    said = read_record(path)  # a file of ours knows what it is, also without its folder
    licence = DINOV3_LICENCE if said is None else said.licence
    ours = said.architecture if said is not None and isinstance(said.architecture, Architecture) else None
    return _named(
        file.tensors,
        str(path),
        ParentRecord(name=path.name, sha256=sha256_file(path), licence=licence),
        file.notes,
        section,
        None if ours is None else ViTConfig(**ours.model_dump(exclude={"name"})),
        num_heads=num_heads,
    )


def is_training_output(path: Path) -> bool:
    """Tell whether a folder is a run, a folder of training checkpoints, or one of them."""
    return path.is_dir() and ((path / META_FILE).is_file() or bool(list_checkpoints(path)) or any(path.glob("*/checkpoints")))


def _from_folder(path: Path, section: str | None, num_heads: int | None) -> FoundWeights:
    if is_model_folder(path) or is_training_output(path):
        role: Literal["teacher", "student"] = "student" if section == "student" else "teacher"
        source = read_source(path if is_model_folder(path) else find_checkpoint(path).folder, role=role)
        if not isinstance(source.architecture, Architecture):
            raise CheckpointError(f"{path} is of {source.architecture.name}, not of a vision transformer of ours")
        parent = ParentRecord(name=path.resolve().name, sha256=None, licence=source.lineage.licence)
        return FoundWeights(
            {name: tensor.float() for name, tensor in to_official(source.tensors, "official").items()},
            "official",
            ViTConfig(**source.architecture.model_dump(exclude={"name"})),
            parent,
            source.heads,
            {head: len(weights) for head, weights in source.heads.items()},
            [f"{source.role} of a MedDINO model"],
            str(path),
        )
    files = ("model.safetensors", "pytorch_model.bin", *SHARD_INDEXES)
    if not is_distcp_folder(path) and not any((path / name).is_file() for name in files):
        raise CheckpointError(
            f"{path} holds no weights that are known: no export, training checkpoint, run, transformers folder or "
            "folder of .distcp files (of DINOv3's ckpt/, give one step's folder)"
        )
    vit = _transformers_config(path / "config.json") if (path / "config.json").is_file() else None
    file = read_sharded_folder(path, section)
    parent = ParentRecord(name=path.resolve().name, licence=DINOV3_LICENCE)
    return _named(file.tensors, str(path), parent, file.notes, section, vit, num_heads)


def _cached_timm_file(name: str) -> Path:
    """Return the file that timm's own download of a model's pretrained weights left on this machine."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5]) or "see timm.list_models('*dinov3*')"
        raise CheckpointError(f"timm has no model '{name}'; near it: {near}")
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    found = try_to_load_from_cache(repository, "model.safetensors") if repository else None
    if not isinstance(found, str):
        raise CheckpointError(
            f"the pretrained weights of timm's '{name}' are not on this machine, and nothing is downloaded; download "
            f"{repository or 'them'} where you may, then give {TIMM_PREFIX}{name}@FILE"
        )
    return Path(found)


def _transformers_config(path: Path) -> ViTConfig:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy the folder again") from error
    if not isinstance(config, Mapping) or "model_type" not in config:
        # Guessing here would lose the input contract without a word.
        raise CheckpointError(f"{path} is not of a MedDINO model (format is not 'meddino-model') and not of transformers")
    return architecture_from_transformers(config, str(path))


def _named(
    tensors: dict[str, Tensor],
    source: str,
    parent: ParentRecord,
    notes: list[str],
    section: str | None,
    config: ViTConfig | None = None,
    num_heads: int | None = None,
) -> FoundWeights:
    backbone, heads, others = _backbone_part(tensors, section or "teacher")
    backbone = {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in backbone.items()}
    layout = detect_layout(backbone)
    if layout is None:
        raise CheckpointError(_what_else(backbone, source))
    official = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in to_official(backbone, layout).items()
    }
    bad = [
        name
        for name, tensor in official.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all() and not DERIVED.match(name)
    ]
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} tensors hold NaN or infinity ({', '.join(bad[:3])}); training broke "
            "down or it was converted to fp16 and overflowed: take an earlier checkpoint, or the original in float32 or bf16"
        )
    config = config or architecture_of(official, source, num_heads)
    return FoundWeights(official, layout, config, parent, heads, others, notes, source)


def _backbone_part(
    tensors: dict[str, Tensor], section: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, int]]:
    """Split a trainer's state dict into backbone, heads and the number of tensors of each other part."""
    for prefix in (f"{section}.", "teacher.", "student."):
        if any(name.startswith(f"{prefix}backbone.") for name in tensors):
            others = {name.partition(".")[0] for name in tensors} - {prefix[:-1]}
            counts = {other: sum(name.startswith(f"{other}.") for name in tensors) for other in sorted(others)}
            inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            backbone, heads, more = _backbone_part(inside, section)
            return backbone, heads, {**more, **counts}
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors, {}, {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    backbone = parts.pop("backbone")
    return backbone, {head: parts[head] for head in HEADS if head in parts}, {part: len(inner) for part, inner in parts.items()}


def _what_else(tensors: Mapping[str, Tensor], source: str) -> str:
    names = list(tensors)
    if "pos_embed" in tensors and any(re.search(r"blocks\.(\d+\.)?\d+\.ls1\.gamma", name) for name in names):
        dim = tensors["pos_embed"].shape[-1]
        letter = {384: "s", 768: "b", 1024: "l", 1536: "g"}.get(dim, "?")
        return (
            f"{source} is a DINOv2 model (position embeddings, width {dim}); it can be evaluated but not trained further: "
            f"meddino-eval ... --model dinov2_vit{letter}14@{source}"
        )
    if any("pos_embed" in name for name in names) and any(".attn.qkv." in name for name in names):
        return (
            f"{source} is a vision transformer with position embeddings, no DINOv3; evaluate it with "
            f"meddino-eval ... --model timm:<its timm name>@{source}, or lvmmed_vitb16@{source} for LVM-Med"
        )
    if any(re.search(r"layer[1-4]\.0\.conv1\.weight", name) for name in names):
        return (
            f"{source} is a ResNet; evaluate it with meddino-eval ... --model timm:resnet50@{source}, or "
            f"lvmmed_resnet50@{source} for LVM-Med"
        )
    return (
        f"{source} holds no DINOv3 backbone under official, timm or transformers names (docs/weights.md says which are read); "
        f"its first names: {', '.join(names[:4])}"
    )
