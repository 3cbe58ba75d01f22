"""Backbone weights from wherever they come: complete, or every gap named, with a report of coverage."""

import fnmatch
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meddino.checkpoints.export.model_folder import ParentRecord
from meddino.checkpoints.export.source import read_source
from meddino.checkpoints.weights.coverage import Coverage, LoadingTolerances
from meddino.checkpoints.weights.find_weights import FoundWeights, find_weights
from meddino.checkpoints.weights.key_formats import DERIVED
from meddino.checkpoints.weights.weight_files import read_weights_file
from meddino.core.errors import CheckpointError
from meddino.core.files import sha256_file
from meddino.core.logging import get_logger
from meddino.layers.rotary_embedding import RotaryEmbedding
from meddino.models.backbone import Backbone
from meddino.models.registry import BackboneConfig, backbone_from_config
from meddino.models.timm_backbone import TIMM_PREFIX, TimmBackbone, TimmConfig
from meddino.models.vision_transformer import ROPE_DTYPES, VisionTransformer, ViTConfig

_log = get_logger(__name__)
_SAM_NAMES = (
    (r"\.mlp\.lin", ".mlp.fc"),
    (r"^layers\.", "blocks."),
    (r"^(blocks\.\d+)\.layer_norm", r"\1.norm"),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^neck\.conv1\.", "neck.0."),
    (r"^neck\.layer_norm1\.", "neck.1."),
    (r"^neck\.conv2\.", "neck.2."),
    (r"^neck\.layer_norm2\.", "neck.3."),
)
"""Names of SAM's image encoder, its own or transformers', to timm's, in this order."""


@dataclass(frozen=True)
class BackboneWeights:
    """Weights that fit a model.

    Attributes:
        tensors: Official names, the model's shapes; not the fresh ones.
        coverage: The report.
        parent: For the lineage.
        heads: See `FoundWeights`.
    """

    tensors: dict[str, Tensor]
    coverage: Coverage
    parent: ParentRecord
    heads: dict[str, dict[str, Tensor]]

    def load_into(self, backbone: Backbone) -> None:
        """Copy the weights in; what the tolerances allowed keeps its fresh values."""
        registers = self.tensors.get("storage_tokens")
        given = dict(self.tensors)
        if (
            isinstance(backbone, VisionTransformer)
            and registers is not None
            and registers.shape[1] < backbone.config.num_registers
        ):
            given["storage_tokens"] = torch.cat([registers, backbone.storage_tokens.detach()[:, registers.shape[1] :]], dim=1)
        outcome = backbone.load_state_dict(given, strict=False)
        assert sorted(outcome.missing_keys) == sorted(self.coverage.fresh) and not outcome.unexpected_keys


def load_backbone_weights(
    source: str | Path, config: BackboneConfig, tolerances: LoadingTolerances | None = None, section: str | None = None
) -> BackboneWeights:
    """Read weights for a model, all of them.

    Args:
        source: See `find_weights`.
        config: The model.
        tolerances: Where they may fall short; None for nowhere.
        section: Of a trainer's file: "teacher" (default) or "student".

    Raises:
        CheckpointError: The source cannot be read, or something is missing, unexpected or of another shape and no
            option allows it; the message is the coverage report.
    """
    if not isinstance(config, ViTConfig):
        return _load_by_own_names(source, config, tolerances or LoadingTolerances(), section)
    found = find_weights(source, section, config.num_heads)
    weights = fit(found, config, tolerances or LoadingTolerances())
    _log.info("%s", weights.coverage.text())
    return weights


def _load_by_own_names(
    source: str | Path, config: BackboneConfig, tolerances: LoadingTolerances, section: str | None
) -> BackboneWeights:
    """Read weights by the backbone's own names: our export, run or checkpoint, or a file; of timm's models timm's names too."""
    text = str(source).removeprefix(f"{TIMM_PREFIX}{config.timm}@") if isinstance(config, TimmConfig) else str(source)
    path, notes, backbone = Path(text), [], backbone_from_config(config)
    model = backbone.model if isinstance(backbone, TimmBackbone) else None
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; nothing is downloaded: give a file or folder on this machine")
    if path.is_dir():
        found = read_source(path, role="student" if section == "student" else "teacher")
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.tensors.items()}
        parent = ParentRecord(name=path.resolve().name, sha256=None, licence=found.lineage.licence)
    else:
        file = read_weights_file(path, section)
        tensors, notes = file.tensors, file.notes
        if model is not None:
            tensors = {f"model.{name}": tensor for name, tensor in timm_names(model, tensors).items()}
        parent = ParentRecord(name=path.name, sha256=sha256_file(path), licence="unknown")
    coverage = Coverage(str(path), "official" if model is None else "timm", notes=notes)
    for name, target in backbone.state_dict().items():
        tensor = tensors.get(name)
        if tensor is None and (name.endswith(".num_batches_tracked") or _matches(name, tolerances.missing)):
            coverage.fresh.append(name)
        elif tensor is None:
            coverage.missing.append(f"{name} {list(target.shape)}")
        elif tensor.shape != target.shape:
            coverage.wrong_shape[name] = f"{list(tensor.shape)} instead of {list(target.shape)}"
        else:
            coverage.loaded[name] = tensor.numel()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head.fc"
    ends = tuple(f"model.{part}." for part in ([classifier] if isinstance(classifier, str) else classifier))
    for name, tensor in tensors.items():
        if name not in coverage.loaded and name not in coverage.wrong_shape:
            allowed = name.startswith(ends) or _matches(name, tolerances.unexpected)
            (coverage.left_out if allowed else coverage.unexpected).append(f"{name} {list(tensor.shape)}")
    _refuse_gaps(coverage)
    _log.info("%s", coverage.text())
    return BackboneWeights({name: tensors[name] for name in coverage.loaded}, coverage, parent, {})


def timm_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors under the names of a timm model, by timm's own rules for the files it knows."""
    if any(".mlp.lin1." in name for name in tensors):  # SAM's image encoder, under its own names or transformers'
        for pattern, replacement in _SAM_NAMES:
            tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    module = sys.modules.get(type(model).__module__)
    rename = getattr(module, "checkpoint_filter_fn", None)
    if rename is None or not type(model).__module__.startswith("timm."):
        return tensors
    renamed: dict[str, Tensor] = dict(rename(dict(tensors), model))
    return renamed


def fit(found: FoundWeights, config: ViTConfig, tolerances: LoadingTolerances) -> BackboneWeights:
    """Fit found weights to a model's names and shapes.

    Raises:
        CheckpointError: Something does not fit and no option allows it.
    """
    with torch.device("meta"):
        wanted = VisionTransformer(config).state_dict()
    coverage = Coverage(found.source, found.layout, other_parts=found.other_parts, notes=found.notes)
    tensors = {name: tensor for name, tensor in found.tensors.items() if not DERIVED.match(name)}
    if found.config.rope_base != config.rope_base:
        coverage.wrong_shape["rope_embed.periods"] = f"rope_base {found.config.rope_base:g} instead of {config.rope_base:g}"
    if found.config.num_heads != config.num_heads:
        # No tensor's shape shows it, and the model would compute something else.
        coverage.wrong_shape["attention heads"] = f"{found.config.num_heads} instead of {config.num_heads}"
    result: dict[str, Tensor] = {}
    for name, target in wanted.items():
        if DERIVED.match(name):
            result[name] = _derived(name, config)
            continue
        tensor = tensors.pop(name, None)
        if tensor is not None:
            tensor = _adapted(name, tensor, target, config, tolerances, coverage)
        elif name.endswith("attn.qkv.bias") and tolerances.qkv_bias == "zeros":
            tensor = torch.zeros(target.shape)
            coverage.adapted[name] = "starts at zero"
        elif (name == "storage_tokens" and tolerances.registers == "fresh") or _matches(name, tolerances.missing):
            coverage.fresh.append(name)
        else:
            coverage.missing.append(f"{name} {list(target.shape)}")
        if tensor is not None:
            result[name] = tensor
            coverage.loaded[name] = tensor.numel()
    for name, tensor in tensors.items():
        dropped = name.endswith("attn.qkv.bias") and tolerances.qkv_bias == "drop"
        allowed = (
            dropped or (name == "storage_tokens" and tolerances.registers == "cut") or _matches(name, tolerances.unexpected)
        )
        (coverage.left_out if allowed else coverage.unexpected).append(f"{name} {list(tensor.shape)}")
    _refuse_gaps(coverage)
    return BackboneWeights(result, coverage, found.parent, found.heads)


def _refuse_gaps(coverage: Coverage) -> None:
    if not coverage.is_complete:
        _log.warning("%s", coverage.text())
        raise CheckpointError(
            f"the weights do not cover the model, and nothing was loaded: {coverage.gap()}; "
            "name each gap in the config (sum_input_channels, resample_patches, qkv_bias, registers, missing, unexpected), "
            "or choose the backbone that the file is of"
        )


def resample_patch_weights(weight: Tensor, size: int) -> Tensor:
    """Return a patch projection for another patch size that gives resized patches the same embedding.

    Args:
        weight: [dim, channels, h, w].
        size: New side [px].

    Source: FlexiViT (Beyer et al. 2023): the pseudo-inverse of the resize operator, not a resize of the weights.
    """
    old = weight.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    resized = nn.functional.interpolate(basis, (size, size), mode="bicubic", antialias=size < old, align_corners=False)
    operator = resized.reshape(old * old, size * size).T  # [new pixels, old pixels]
    # <patch, w> = <resize(patch), w'> for every patch that can be told apart: w' = pinv(operator^T) w.
    flat = weight.double().flatten(2) @ torch.linalg.pinv(operator.T).T
    resampled: Tensor = flat.reshape(*weight.shape[:2], size, size).to(weight.dtype)
    return resampled


def _adapted(
    name: str, tensor: Tensor, target: Tensor, config: ViTConfig, tolerances: LoadingTolerances, coverage: Coverage
) -> Tensor | None:
    if name == "patch_embed.proj.weight":
        if tolerances.sum_input_channels and target.shape[1] == 1 and tensor.shape[1] > 1:
            coverage.adapted[name] = f"{tensor.shape[1]} input channels summed"
            tensor = tensor.sum(dim=1, keepdim=True)
        if tolerances.resample_patches and tensor.shape[-1] != target.shape[-1] and tensor.shape[-1] == tensor.shape[-2]:
            before = coverage.adapted.get(name, "")
            coverage.adapted[name] = (
                f"{before}{', ' if before else ''}resampled from {tensor.shape[-1]} to {target.shape[-1]} px"
            )
            tensor = resample_patch_weights(tensor, target.shape[-1])
    if name == "storage_tokens" and tensor.shape[-1] == target.shape[-1]:
        found, wanted = tensor.shape[1], target.shape[1]
        if (found > wanted and tolerances.registers == "cut") or (found < wanted and tolerances.registers == "fresh"):
            coverage.adapted[name] = f"{min(found, wanted)} registers of {found}, the model has {wanted}"
            return tensor[:, :wanted]
    if name.endswith("attn.qkv.bias") and config.mask_k_bias and tensor.chunk(3)[1].any():
        coverage.unexpected.append(f"{name}: its keys' bias is not zero, and the model holds it there (mask_k_bias)")
    if tensor.shape != target.shape:
        coverage.wrong_shape[name] = f"{list(tensor.shape)} instead of {list(target.shape)}"
        return None
    return tensor


def _derived(name: str, config: ViTConfig) -> Tensor:
    """Return the value of a buffer that the architecture fixes."""
    if name.endswith("bias_mask"):
        mask = torch.ones(3 * config.embed_dim)
        mask[config.embed_dim : 2 * config.embed_dim] = 0
        return mask
    rope = RotaryEmbedding(config.embed_dim // config.num_heads, config.rope_base, dtype=ROPE_DTYPES[config.rope_dtype])
    return rope.periods


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
