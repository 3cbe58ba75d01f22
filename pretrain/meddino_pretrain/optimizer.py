"""Parameter groups with layer-wise decay, AdamW over them, and clipping by module."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meddino.core.precision import at_least_float32
from meddino.models.backbone import Backbone

BACKBONE = "backbone"


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is trained.

    Attributes:
        lr_multiplier: On the scheduled learning rate.
        weight_decay_multiplier: On the scheduled weight decay; 0 for biases, norms and LayerScale.
        is_last_layer: The prototypes of a head, which are held still at the start.
    """

    lr_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool


def parameter_rules(
    modules: Mapping[str, nn.Module], layerwise_decay: float = 0.9, patch_embed_lr_multiplier: float = 0.2
) -> dict[str, ParameterRule]:
    """Say for every trainable parameter how it is trained.

    Args:
        modules: The student's parts by name; a `Backbone` gets the layer-wise decay over its layer groups.
        layerwise_decay: The learning rate of a layer group is this to the power of its distance from the output.
        patch_embed_lr_multiplier: On the layer that reads pixels besides.

    Returns:
        "module.parameter" to rule, in the order of the modules.

    Source: DINOv3's parameter groups (shared/reference records all of one model).
    """
    rules: dict[str, ParameterRule] = {}
    for module_name, module in modules.items():
        groups = module.layer_groups() if isinstance(module, Backbone) else []
        group_of = {name: group for group in groups for name in group.parameters}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            group = group_of.get(name)
            rate = layerwise_decay**group.distance if group else 1.0
            if group and group.is_stem:
                rate *= patch_embed_lr_multiplier
            decays = parameter.ndim > 1  # not biases, norms and LayerScale
            rules[f"{module_name}.{name}"] = ParameterRule(rate, float(decays), "last_layer" in name)
    return rules


def build_optimizer(
    modules: Mapping[str, nn.Module],
    rules: Mapping[str, ParameterRule],
    betas: tuple[float, float] = (0.9, 0.999),
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters, those with the same rule and module in one group.

    Learning rate and weight decay are set before every step by `set_rates`.

    Args:
        modules: The student's parts by name.
        rules: From `parameter_rules`.
        betas: Of AdamW.
        fused: True for the fused kernel, which exists for the CPU and CUDA; None leaves the choice to torch.
    """
    groups: dict[tuple[str, ParameterRule], list[Tensor]] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            rule = rules.get(f"{module_name}.{name}")
            if rule is not None:
                groups.setdefault((module_name, rule), []).append(parameter)
    described = [{"params": members, "module": name, "rule": rule} for (name, rule), members in groups.items()]
    return torch.optim.AdamW(described, lr=0.0, betas=betas, weight_decay=0.0, fused=fused)


def set_rates(
    optimizer: torch.optim.Optimizer,
    lr: float,
    weight_decay: float,
    last_layer_lr_multiplier: float = 1.0,
    backbone_lr_multiplier: float = 1.0,
) -> None:
    """Give every group its learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        rule: ParameterRule = group["rule"]
        rate = lr * rule.lr_multiplier
        if rule.is_last_layer:
            rate *= last_layer_lr_multiplier
        if group["module"] == BACKBONE:
            rate *= backbone_lr_multiplier
        group["lr"] = rate
        group["weight_decay"] = weight_decay * rule.weight_decay_multiplier


def clip_by_module(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of each module to a norm of its own.

    Args:
        modules: The student's parts by name.
        max_norm: Largest allowed L2 norm of one module's gradient; infinity never clips.

    Returns:
        The norms before clipping, 0-d float32 tensors on the parameters' device: looking at them waits for the device.
    """
    norms: dict[str, Tensor] = {}
    for name, module in modules.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):  # FSDP2: each process holds a part of every gradient
            norm = norm.full_tensor()
        if math.isfinite(max_norm):
            torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
        norms[name] = at_least_float32(norm.detach())
    return norms
