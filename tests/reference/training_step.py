"""One recorded training step through the project's own method, optimizer, clipping and teacher."""

import re
from typing import Any

import torch
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.methods.base import StageSetting
from meddino_pretrain.methods.dinov3.config import (
    CropsConfig,
    CropSizes,
    DINOv3Config,
    GramTeacherConfig,
    LossesConfig,
    TeacherConfig,
)
from meddino_pretrain.methods.dinov3.method import DINOv3
from meddino_pretrain.methods.dinov3.network import DINOv3Network
from meddino_pretrain.methods.dinov3.views import GLOBAL, GRAM, LOCAL, mask_extras
from meddino_pretrain.optimizer import build_optimizer, clip_by_module, parameter_rules, set_rates
from meddino_pretrain.schedules import StepValues
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.models.vision_transformer import VisionTransformer
from tests.reference.losses import head_of_weights
from tests.reference.records import Records, config_of_weights, part
from tests.reference.report import Item, absolute, relative

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
STUDENT_TOLERANCE = 1e-5
TEACHER_TOLERANCE = 1e-6
# Below this gradient Adam's first step, which divides it by its own size, follows rounding.
SMALLEST_GRADIENT = 1e-6
MACHINE = Machine(torch.device("cpu"), torch.float32)
LOSSES = {
    "dino_global_crops_loss": "dino_global",
    "dino_local_crops_loss": "dino_local",
    "ibot_loss": "ibot",
    "koleo_loss": "koleo",
    "gram_loss": "gram",
    "total": "total",
}


def compare_training_step(records: Records) -> list[Item]:
    """Compare every loss term, gradient, the student after AdamW and the teacher after its update."""
    described, tensors = records.described["training_step"], records.tensors("training_step")
    method = build_method(described, tensors)
    settings = described["optimizer"]
    rules = parameter_rules(method.trainable(), settings["layerwise_decay"], settings["patch_embed_lr_multiplier"])
    optimizer = build_optimizer(method.trainable(), rules, tuple(settings["adamw_betas"]))
    values = StepValues(
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        own={"ema_momentum": settings["ema_momentum"], "teacher_temperature": described["teacher_temperature"]},
    )
    set_rates(optimizer, values)
    (losses,) = _backward(method, _batch(described, tensors), values)
    items = [
        relative(f"loss {name}", losses[ours], tensors[f"loss.{name}"], LOSS_TOLERANCE)
        for name, ours in _recorded_losses(tensors)
    ]
    parameters = dict(method.student.named_parameters())
    gradients = {name: _gradient(parameter) for name, parameter in parameters.items()}
    items += [
        relative(f"gradient {name}", gradients[name], recorded, GRADIENT_TOLERANCE)
        for name, recorded in part(tensors, "grad.").items()
    ]
    clip_by_module(method.trainable(), settings["clip_grad_norm_per_module"])
    optimizer.step()
    method.after_step(values)
    items += _students(gradients, parameters, tensors)
    return [*items, *_teachers(gradients, dict(method.teacher.named_parameters()), tensors)]


def compare_parameter_groups(records: Records) -> list[Item]:
    """Compare learning-rate and weight-decay multipliers of every parameter, and which are last layers."""
    described, tensors = records.described["training_step"], records.tensors("training_step")
    settings, recorded = described["optimizer"], records.described["parameter_groups"]
    student = build_network(part(tensors, "student."), described)
    modules = dict(student.named_children())
    rules = parameter_rules(modules, settings["layerwise_decay"], settings["patch_embed_lr_multiplier"], ("last_layer",))
    different = sorted(set(rules) ^ set(recorded))
    note = f"only on one side: {', '.join(different[:5])}" if different else ""
    items = [Item("parameter groups: names", float(len(different)), 0.0, "number that differ", note)]
    both = sorted(set(rules) & set(recorded))
    for key, tolerance in (("lr_multiplier", 1e-12), ("weight_decay_multiplier", 0.0), ("is_last_layer", 0.0)):
        ours = {name: vars(rules[name]) | {"is_last_layer": bool(rules[name].lr_schedules)} for name in both}
        differences = {name: abs(float(ours[name][key]) - float(recorded[name][key])) for name in both}
        worst = max(both, key=lambda name: differences[name])
        items.append(
            Item(f"parameter groups: {key}", differences[worst], tolerance, "absolute", worst if differences[worst] else "")
        )
    return items


def build_network(weights: dict[str, Tensor], described: dict[str, Any]) -> DINOv3Network:
    """Return the network that a state dict belongs to, loaded strictly."""
    backbone = part(weights, "backbone.")
    network = DINOv3Network(
        VisionTransformer(config_of_weights(backbone, described["backbone"])),
        head_of_weights(part(weights, "dino_head.")),
        head_of_weights(part(weights, "ibot_head.")),
    )
    network.load_state_dict(weights)
    return network


def build_method(described: dict[str, Any], tensors: dict[str, Tensor]) -> DINOv3:
    """Return the project's method with the recorded weights."""
    weights = described["weights_of_terms"]
    gram_weights = part(tensors, "gram_teacher.backbone.")
    gram_teacher = None
    if gram_weights:
        gram_teacher = VisionTransformer(config_of_weights(gram_weights, described["backbone"]))
        gram_teacher.load_state_dict(gram_weights)
    gram = gram_teacher is not None
    losses = LossesConfig(
        dino_weight=float(weights["dino"]),
        dino_local_multiplier=float(weights.get("dino_local", 1.0)),
        ibot_weight=float(weights["ibot"]),
        koleo_weight=float(weights["koleo"]),
        gram_weight=float(weights.get("gram", 0.0)) if gram else 0.0,
        student_temperature=float(described["student_temperature"]),
    )
    config = DINOv3Config(
        losses=losses,
        crops=CropsConfig(sizes=(CropSizes(global_px=16, local_px=16, gram_px=32 if gram else None),)),
        teacher=TeacherConfig(ema_momentum=0.9, ema_momentum_end=0.9, temperature_warmup_steps=0),
        freeze_last_layer_steps=0,
        gram_teacher=GramTeacherConfig(stage="earlier", step=1) if gram else None,
    )
    student, teacher = (build_network(part(tensors, f"{name}."), described) for name in ("student", "teacher"))
    setting = StageSetting(1, 0, BatchShare(described["batch"]), MACHINE)
    return DINOv3(student, teacher, config, setting, gram_teacher)


def _batch(described: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    views = {name: tensors[f"input.{name}"] for name in (GLOBAL, LOCAL, GRAM) if f"input.{name}" in tensors}
    return Batch(0, 0, views, [str(sample) for sample in range(described["batch"])], extras=mask_extras(tensors["input.masks"]))


def _backward(method: DINOv3, batch: Batch, values: StepValues) -> list[dict[str, Tensor]]:
    seen = []
    for losses in method.losses([batch], values, 0):
        losses["total"].backward()
        seen.append(dict(losses))
    return seen


def _recorded_losses(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    return [(name, ours) for name, ours in LOSSES.items() if f"loss.{name}" in tensors]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _students(gradients: dict[str, Tensor], parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> list[Item]:
    items = []
    for name, after in part(tensors, "after.student.").items():
        decided, note = _decided(gradients[name], tensors.get(f"grad.{name}"))
        items.append(absolute(f"student after {name}", parameters[name][decided], after[decided], STUDENT_TOLERANCE, note))
    return items


def _teachers(gradients: dict[str, Tensor], parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> list[Item]:
    items = []
    for name, after in part(tensors, "after.teacher.").items():
        if re.search(r"rope_embed|bias_mask", name):
            continue
        decided, note = _decided(gradients[name], tensors.get(f"grad.{name}"))
        items.append(absolute(f"teacher after {name}", parameters[name][decided], after[decided], TEACHER_TOLERANCE, note))
    return items


def _decided(found: Tensor, recorded: Tensor | None) -> tuple[Tensor, str]:
    """Tell where the sign of the gradient, and so Adam's first step, is no coin toss of rounding.

    Left out are gradients below `SMALLEST_GRADIENT`, and those that came out with the other sign while they are smaller
    than what the tolerance of the whole gradient calls equal.
    """
    if recorded is None:
        return torch.ones_like(found, dtype=torch.bool), ""
    size = recorded.abs()
    within_tolerance = size <= GRADIENT_TOLERANCE * recorded.square().mean().sqrt()
    undecided = (size <= SMALLEST_GRADIENT) | (within_tolerance & (found.sign() != recorded.sign()))
    count = int(undecided.sum())
    note = f"{count} of {size.numel()} left out: gradient up to {float(size[undecided].max()):.1e}" if count else ""
    return ~undecided, note
