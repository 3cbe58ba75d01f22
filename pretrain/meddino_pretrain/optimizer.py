"""Parameter groups with layer-wise decay, AdamW over them, and clipping by module."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meddino.core.device import at_least_float32
from meddino.models.backbone import Backbone
from meddino_pretrain.schedules import StepValues


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is trained.

    Attributes:
        lr_multiplier: On the scheduled learning rate.
        weight_decay_multiplier: On the scheduled weight decay; 0 for biases, norms and LayerScale.
        lr_schedules: Names whose factors of the step its learning rate is multiplied by besides.
    """

    lr_multiplier: float
    weight_decay_multiplier: float
    lr_schedules: tuple[str, ...] = ()


def parameter_rules(
    modules: Mapping[str, nn.Module],
    layerwise_decay: float = 0.9,
    patch_embed_lr_multiplier: float = 0.2,
    lr_schedules: Sequence[str] = ("backbone",),
) -> dict[str, ParameterRule]:
    """Say for every trainable parameter how it is trained.

    Args:
        modules: The trained modules by name; a `Backbone` among them gets the layer-wise decay.
        layerwise_decay: The learning rate of a layer group is this to the power of its distance from the output.
        patch_embed_lr_multiplier: On the layer that reads pixels besides.
        lr_schedules: Parts of parameters' dotted names that have a factor of their own in every step.

    Returns:
        "module.parameter" to rule, in the order of the modules.

    Source: DINOv3's parameter groups (shared/reference records all of one model).
    """
    rules: dict[str, ParameterRule] = {}
    for module_name, module in modules.items():
        rates = _backbone_rates(module, layerwise_decay, patch_embed_lr_multiplier) if isinstance(module, Backbone) else {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            full = f"{module_name}.{name}"
            decays = parameter.ndim > 1  # not biases, norms and LayerScale
            schedules = tuple(each for each in lr_schedules if each in full.split("."))
            rules[full] = ParameterRule(rates.get(name, 1.0), float(decays), schedules)
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
        modules: The trained modules by name.
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
    described = [{"params": members, "rule": rule} for (_, rule), members in groups.items()]
    return torch.optim.AdamW(described, lr=0.0, betas=betas, weight_decay=0.0, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Give every group its learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        rule: ParameterRule = group["rule"]
        rate = values.lr * rule.lr_multiplier
        for name in rule.lr_schedules:
            rate *= values.lr_multipliers.get(name, 1.0)
        group["lr"] = rate
        group["weight_decay"] = values.weight_decay * rule.weight_decay_multiplier


def clip_by_module(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of each module to a norm of its own.

    Args:
        modules: The trained modules by name.
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


def _backbone_rates(backbone: Backbone, decay: float, stem_multiplier: float) -> dict[str, float]:
    return {
        name: decay**group.distance * (stem_multiplier if group.is_stem else 1.0)
        for group in backbone.layer_groups()
        for name in group.parameters
    }
