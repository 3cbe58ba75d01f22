"""Backbone weights from wherever they come: complete, or every gap named, with a report of coverage."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meddino.checkpoints.export.model_folder import ParentRecord
from meddino.checkpoints.weights.coverage import Coverage, GapsConfig
from meddino.checkpoints.weights.find_weights import FoundWeights, find_weights
from meddino.checkpoints.weights.key_formats import DERIVED
from meddino.core.errors import CheckpointError
from meddino.core.logging import get_logger
from meddino.layers.rotary_embedding import RotaryEmbedding
from meddino.models.vision_transformer import ROPE_DTYPES, VisionTransformer, ViTConfig

_log = get_logger(__name__)


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

    def load_into(self, backbone: VisionTransformer) -> None:
        """Copy the weights in; what the gaps allowed keeps its fresh values."""
        registers = self.tensors.get("storage_tokens")
        given = dict(self.tensors)
        if registers is not None and registers.shape[1] < backbone.config.num_registers:
            given["storage_tokens"] = torch.cat([registers, backbone.storage_tokens.detach()[:, registers.shape[1] :]], dim=1)
        outcome = backbone.load_state_dict(given, strict=False)
        assert sorted(outcome.missing_keys) == sorted(self.coverage.fresh) and not outcome.unexpected_keys


def load_backbone_weights(
    source: str | Path, config: ViTConfig, gaps: GapsConfig | None = None, section: str | None = None
) -> BackboneWeights:
    """Read weights for a model, all of them.

    Args:
        source: See `find_weights`.
        config: The model.
        gaps: Where they may fall short.
        section: Of a trainer's file: "teacher" (default) or "student".

    Raises:
        CheckpointError: The source cannot be read, or something is missing, unexpected or of another shape and no
            option allows it; the message is the coverage report.
    """
    found = find_weights(source, section, config.num_heads)
    weights = fit(found, config, gaps or GapsConfig())
    _log.info("%s", weights.coverage.text())
    return weights


def fit(found: FoundWeights, config: ViTConfig, gaps: GapsConfig) -> BackboneWeights:
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
            tensor = _adapted(name, tensor, target, config, gaps, coverage)
        elif name.endswith("attn.qkv.bias") and gaps.qkv_bias == "zeros":
            tensor = torch.zeros(target.shape)
            coverage.adapted[name] = "starts at zero"
        elif (name == "storage_tokens" and gaps.registers == "fresh") or _matches(name, gaps.missing):
            coverage.fresh.append(name)
        else:
            coverage.missing.append(f"{name} {list(target.shape)}")
        if tensor is not None:
            result[name] = tensor
            coverage.loaded[name] = tensor.numel()
    for name, tensor in tensors.items():
        dropped = name.endswith("attn.qkv.bias") and gaps.qkv_bias == "drop"
        allowed = dropped or (name == "storage_tokens" and gaps.registers == "cut") or _matches(name, gaps.unexpected)
        (coverage.left_out if allowed else coverage.unexpected).append(f"{name} {list(tensor.shape)}")
    if not coverage.is_complete:
        _log.warning("%s", coverage.text())
        raise CheckpointError(
            f"the weights do not cover the model, and nothing was loaded: {coverage.gap()}; "
            "name each gap in the config (sum_input_channels, resample_patches, qkv_bias, registers, missing, unexpected), "
            "or choose the backbone that the file is of"
        )
    return BackboneWeights(result, coverage, found.parent, found.heads)


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
    name: str, tensor: Tensor, target: Tensor, config: ViTConfig, gaps: GapsConfig, coverage: Coverage
) -> Tensor | None:
    if name == "patch_embed.proj.weight":
        if gaps.sum_input_channels and target.shape[1] == 1 and tensor.shape[1] > 1:
            coverage.adapted[name] = f"{tensor.shape[1]} input channels summed"
            tensor = tensor.sum(dim=1, keepdim=True)
        if gaps.resample_patches and tensor.shape[-1] != target.shape[-1] and tensor.shape[-1] == tensor.shape[-2]:
            before = coverage.adapted.get(name, "")
            coverage.adapted[name] = (
                f"{before}{', ' if before else ''}resampled from {tensor.shape[-1]} to {target.shape[-1]} px"
            )
            tensor = resample_patch_weights(tensor, target.shape[-1])
    if name == "storage_tokens" and tensor.shape[-1] == target.shape[-1]:
        found, wanted = tensor.shape[1], target.shape[1]
        if (found > wanted and gaps.registers == "cut") or (found < wanted and gaps.registers == "fresh"):
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
