"""Parameter groups, rates, clipping and EMA against the records, literals and slow loops."""

import json
import math

import pytest
import torch
from meddino_pretrain.methods.ema import update_teacher
from meddino_pretrain.optimizer import ParameterRule, build_optimizer, clip_by_module, parameter_rules, set_rates
from meddino_pretrain.schedules import StepValues
from torch import nn

from meddino.layers.projection_head import ProjectionHead
from meddino.models.vision_transformer import VisionTransformer, ViTConfig


def modules(depth: int = 3) -> dict[str, nn.Module]:
    backbone = VisionTransformer(ViTConfig(embed_dim=16, depth=depth, num_heads=2, patch_size=4))
    return {
        "backbone": backbone,
        "dino_head": ProjectionHead(16, 12, 8, 4),
        "ibot_head": ProjectionHead(16, 12, 8, 4),
    }


def test_parameter_rules__equal_the_records(shared_reference):
    recorded = json.loads((shared_reference / "records.json").read_text())["parameter_groups"]
    rules = parameter_rules(modules(depth=3), 0.9, 0.2, ("last_layer",))
    assert rules.keys() == recorded.keys()
    for name, rule in rules.items():
        assert rule.lr_multiplier == pytest.approx(recorded[name]["lr_multiplier"], rel=1e-12), name
        assert rule.weight_decay_multiplier == recorded[name]["weight_decay_multiplier"], name
        assert bool(rule.lr_schedules) == recorded[name]["is_last_layer"], name


def test_parameter_rules__literals():
    rules = parameter_rules(modules(depth=2), 0.5, 0.2, ("last_layer",))
    assert rules["backbone.cls_token"] == ParameterRule(0.125, 1.0)
    assert rules["backbone.patch_embed.proj.weight"] == ParameterRule(0.125 * 0.2, 1.0)
    assert rules["backbone.blocks.0.attn.qkv.weight"] == ParameterRule(0.25, 1.0)
    assert rules["backbone.blocks.1.ls1.gamma"] == ParameterRule(0.5, 0.0)
    assert rules["backbone.norm.weight"] == ParameterRule(1.0, 0.0)
    assert rules["dino_head.last_layer.weight"] == ParameterRule(1.0, 1.0, ("last_layer",))


def test_set_rates__multiplies_by_rule():
    parts = modules(depth=2)
    optimizer = build_optimizer(parts, parameter_rules(parts, 0.5, 0.2, ("backbone", "last_layer")))
    set_rates(optimizer, StepValues(1.0, 0.04, {"backbone": 0.1, "last_layer": 0.0}))
    found = {
        id(parameter): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for parameter in group["params"]
    }
    assert found[id(parts["dino_head"].last_layer.weight)] == (0.0, 0.04)
    assert found[id(parts["backbone"].blocks[0].attn.qkv.weight)] == pytest.approx((0.025, 0.04))
    assert found[id(parts["ibot_head"].mlp[0].bias)] == (1.0, 0.0)


def test_build_optimizer__steps_like_one_group_a_parameter():
    torch.manual_seed(0)
    parts = modules(depth=2)
    rules = parameter_rules(parts)
    grouped = build_optimizer(parts, rules, fused=True)
    set_rates(grouped, StepValues(1e-2, 0.1))
    expected = {}
    for module_name, module in parts.items():
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            rule = rules[f"{module_name}.{name}"]
            # AdamW's first step, written out: the moments' bias correction leaves grad / |grad|.
            lr, decay = 1e-2 * rule.lr_multiplier, 0.1 * rule.weight_decay_multiplier
            direction = parameter.grad / (parameter.grad.abs() + 1e-8)
            expected[f"{module_name}.{name}"] = parameter.detach() * (1 - lr * decay) - lr * direction
    grouped.step()
    for module_name, module in parts.items():
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[f"{module_name}.{name}"], atol=1e-6, rtol=1e-5)


def test_clip_by_module__each_to_its_own_norm():
    parts = {"backbone": nn.Linear(3, 2), "dino_head": nn.Linear(2, 2)}
    for module, size in zip(parts.values(), (10.0, 0.1), strict=True):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, size)
    norms = clip_by_module(parts, 3.0)
    assert float(norms["backbone"]) == pytest.approx(10 * math.sqrt(8))
    clipped = torch.cat([parameter.grad.flatten() for parameter in parts["backbone"].parameters()])
    assert float(clipped.norm()) == pytest.approx(3.0, rel=1e-5)
    assert float(parts["dino_head"].bias.grad[0]) == pytest.approx(0.1)


def test_update_teacher__equals_a_loop():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    expected = [0.9 * t.detach() + 0.1 * s.detach() for s, t in zip(student.parameters(), teacher.parameters(), strict=True)]
    update_teacher(student, teacher, 0.9)
    for found, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
