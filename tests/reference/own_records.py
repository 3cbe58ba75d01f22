"""Makes a folder of records from `plain`, in the format of shared/reference and with whatever sizes are asked for."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference import plain
from tests.reference.plain import StepSettings, Weights

SETTINGS = StepSettings(
    num_heads=5, batch=3, teacher_temperature=0.06, student_temperature=0.13, dino=0.7, ibot=1.3, koleo=0.2, gram=1.5
)
OPTIMIZER: dict[str, Any] = {
    "adamw_betas": [0.85, 0.97],
    "lr": 0.002,
    "weight_decay": 0.07,
    "layerwise_decay": 0.8,
    "patch_embed_lr_multiplier": 0.3,
    "clip_grad_norm_per_module": 0.5,
    "ema_momentum": 0.98,
}


def write_records(folder: Path, seed: int) -> None:
    """Write records of other sizes than those in shared/reference: 5 heads of 8, patch 8, 3 registers, 50 prototypes."""
    rng = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"source": "tests/reference/plain.py", "seed": seed}
    tensors = _backbone_file(rng)
    arguments = {"patch_size": 8, "embed_dim": 40, "depth": 2, "num_heads": 5, "ffn_ratio": 6, "ffn_layer": "swiglu"}
    arguments |= {"n_storage_tokens": 3, "mask_k_bias": True, "qkv_bias": True, "layerscale_init": 1e-5, "in_chans": 1}
    described["backbone_odd"] = {"arguments": {**arguments, "pos_embed_rope_dtype": "fp32"}}
    save_file(tensors, folder / "backbone_odd.safetensors")
    described["losses"] = {
        "what": "student temperature 0.2; three Sinkhorn-Knopp iterations",
        "teacher_temperature": 0.05,
        "batch": 4,
        "prototypes": 30,
    }
    save_file(_losses_file(rng), folder / "losses.safetensors")
    tensors, groups = _step_file(rng)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "training_step.safetensors")
    described["training_step"] = {
        "batch": SETTINGS.batch,
        "teacher_temperature": SETTINGS.teacher_temperature,
        "student_temperature": SETTINGS.student_temperature,
        "backbone": {"num_heads": SETTINGS.num_heads, "registers": 3, "drop_path": 0.0, "rope_base": 100.0},
        "weights_of_terms": {
            "dino": SETTINGS.dino,
            "ibot": SETTINGS.ibot,
            "koleo": SETTINGS.koleo,
            "gram": SETTINGS.gram,
        },
        "optimizer": OPTIMIZER,
    }
    described["parameter_groups"] = groups
    (folder / "records.json").write_text(json.dumps(described))


def _random(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=rng) * scale


def _linear(rng: torch.Generator, name: str, outputs: int, inputs: int) -> Weights:
    weight = _random(rng, outputs, inputs, scale=inputs**-0.5)
    return {f"{name}.weight": weight, f"{name}.bias": _random(rng, outputs, scale=0.1)}


def _norm(rng: torch.Generator, name: str, dim: int) -> Weights:
    return {f"{name}.weight": 1 + _random(rng, dim, scale=0.1), f"{name}.bias": _random(rng, dim, scale=0.1)}


def backbone_weights(rng: torch.Generator, dim: int, depth: int, heads: int, patch: int, channels: int, gated: bool) -> Weights:
    """Return random weights under official names, with 3 registers."""
    weights: Weights = {
        "cls_token": _random(rng, 1, 1, dim),
        "storage_tokens": _random(rng, 1, 3, dim),
        "mask_token": _random(rng, 1, dim),
        "patch_embed.proj.weight": _random(rng, dim, channels, patch, patch, scale=0.1),
        "patch_embed.proj.bias": _random(rng, dim, scale=0.1),
        "rope_embed.periods": torch.tensor([100 ** (4 * i / (dim // heads)) for i in range(dim // heads // 4)]),
    }
    for number in range(depth):
        block = f"blocks.{number}"
        mask = torch.cat([torch.ones(dim), torch.zeros(dim), torch.ones(dim)])
        hidden = dim * 4
        weights |= _norm(rng, f"{block}.norm1", dim) | _norm(rng, f"{block}.norm2", dim)
        weights |= _linear(rng, f"{block}.attn.qkv", 3 * dim, dim) | {f"{block}.attn.qkv.bias_mask": mask}
        weights |= _linear(rng, f"{block}.attn.proj", dim, dim)
        if gated:
            weights |= _linear(rng, f"{block}.mlp.w1", hidden, dim) | _linear(rng, f"{block}.mlp.w2", hidden, dim)
            weights |= _linear(rng, f"{block}.mlp.w3", dim, hidden)
        else:
            weights |= _linear(rng, f"{block}.mlp.fc1", hidden, dim) | _linear(rng, f"{block}.mlp.fc2", dim, hidden)
        weights |= {f"{block}.{name}.gamma": 0.5 + _random(rng, dim, scale=0.1) for name in ("ls1", "ls2")}
    return weights | _norm(rng, "norm", dim)


def _head_weights(rng: torch.Generator, dim: int, prototypes: int) -> Weights:
    weights = _linear(rng, "mlp.0", 20, dim) | _linear(rng, "mlp.2", 20, 20) | _linear(rng, "mlp.4", 12, 20)
    return weights | {"last_layer.weight": _random(rng, prototypes, 12, scale=0.3)}


def _backbone_file(rng: torch.Generator) -> Weights:
    weights = backbone_weights(rng, dim=40, depth=2, heads=5, patch=8, channels=1, gated=True)
    tensors = {f"weights.{name}": value for name, value in weights.items()}
    for number, (height, width) in enumerate([(16, 32), (24, 8)]):
        images = _random(rng, 2, 1, height, width)
        mask = torch.rand(2, height * width // 64, generator=rng) < 0.4
        tokens, masked = plain.backbone(weights, images, 5), plain.backbone(weights, images, 5, mask)
        named = {"input": images, "mask": mask, "cls_token": tokens.cls_token, "register_tokens": tokens.register_tokens}
        named |= {
            "patch_tokens": tokens.patch_tokens,
            "masked.cls_token": masked.cls_token,
            "masked.patch_tokens": masked.patch_tokens,
        }
        named |= {f"block{block}": value for block, value in enumerate(tokens.block_patches)}
        tensors |= {f"case{number}.{name}": value.contiguous() for name, value in named.items()}
    return tensors


def _losses_file(rng: torch.Generator) -> Weights:
    students, locals_, teachers = _random(rng, 2, 4, 30), _random(rng, 3, 4, 30), _random(rng, 8, 30)
    probabilities = plain.sinkhorn(teachers, 0.05)
    by_crop = probabilities.view(2, 4, 30)
    masks = torch.rand(8, 9, generator=rng) < 0.4
    count = int(masks.sum())
    patch_teacher, patch_student = _random(rng, count, 30), _random(rng, count, 30)
    patch_probabilities = plain.sinkhorn(patch_teacher, 0.05)
    one, other = _random(rng, 2, 9, 7), _random(rng, 2, 9, 7)
    features, wide = _random(rng, 4, 7), _random(rng, 1, 5, 6, 10)
    head, x = _head_weights(rng, 7, 30), _random(rng, 5, 7)
    tensors = {
        "dino.student_global_logits": students,
        "dino.student_local_logits": locals_,
        "dino.teacher_logits": teachers,
        "dino.teacher_probabilities": probabilities,
        "dino.loss_global": plain.dino(students, by_crop, 0.2, False),
        "dino.loss_global_ignore_diagonal": plain.dino(students, by_crop, 0.2, True),
        "dino.loss_local": plain.dino(locals_, by_crop, 0.2, False),
        "ibot.masks": masks,
        "ibot.mask_weights": torch.cat([torch.full((int(n),), 1 / float(n)) for n in masks.sum(1) if n]),
        "ibot.teacher_logits": patch_teacher,
        "ibot.student_logits": patch_student,
        "ibot.teacher_probabilities": patch_probabilities,
        "ibot.loss": plain.ibot(patch_student, patch_probabilities, masks, 0.2),
        "koleo.features": features,
        "koleo.loss": plain.koleo(features),
        "gram.student": one,
        "gram.teacher": other,
        "gram.loss_image_level": plain.gram(one, other),
        "gram.loss_batch_level": plain.gram(one, other, batch_level=True),
        "gram.loss_remove_negative": plain.gram(one, other, negatives="remove"),
        "gram.loss_remove_teacher_negative": plain.gram(one, other, negatives="remove_teacher"),
        "gram.resize_input": wide,
        "gram.resize_output": plain.resize(wide, (3, 5)),
        "head.input": x,
        "head.output": plain.head(head, x),
    }
    return {name: value.contiguous() for name, value in tensors.items()} | {f"head.weights.{k}": v for k, v in head.items()}


def _network(rng: torch.Generator) -> Weights:
    backbone = backbone_weights(rng, dim=40, depth=2, heads=5, patch=8, channels=1, gated=False)
    heads = {f"{name}.{key}": value for name in ("dino_head", "ibot_head") for key, value in _head_weights(rng, 40, 50).items()}
    return {f"backbone.{name}": value for name, value in backbone.items()} | heads


def _step_file(rng: torch.Generator) -> tuple[Weights, dict[str, Any]]:
    student, teacher = _network(rng), _network(rng)
    gram_teacher = {name: value for name, value in _network(rng).items() if name.startswith("backbone.")}
    batch = SETTINGS.batch
    crops = {
        "global_crops": _random(rng, 2 * batch, 1, 24, 24),
        "local_crops": _random(rng, 5 * batch, 1, 16, 16),
        "gram_teacher_crops": _random(rng, 2 * batch, 1, 48, 48),
        "masks": torch.rand(2 * batch, 9, generator=rng) < 0.5,
    }
    trained = [name for name in student if not name.endswith(("bias_mask", "periods"))]
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in student.items()}
    losses = plain.step_losses(leaves, teacher, gram_teacher, crops, SETTINGS)
    losses["total"].backward()
    gradients = {name: leaves[name].grad.clone() for name in trained}
    groups = {name: _group(name, depth=2) for name in trained}
    after = _adamw(student, gradients, groups)
    momentum = OPTIMIZER["ema_momentum"]
    tensors = {f"student.{name}": value for name, value in student.items()} | {f"teacher.{k}": v for k, v in teacher.items()}
    tensors |= {f"gram_teacher.{name}": value for name, value in gram_teacher.items()}
    tensors |= {f"input.{name}": value for name, value in crops.items()}
    tensors |= {f"loss.{name}": value.detach() for name, value in losses.items()}
    tensors |= {f"grad.{name}": value for name, value in gradients.items()}
    tensors |= {f"after.student.{name}": value for name, value in after.items()}
    tensors |= {f"after.teacher.{name}": momentum * teacher[name] + (1 - momentum) * value for name, value in after.items()}
    return tensors, groups


def _group(name: str, depth: int) -> dict[str, Any]:
    module, _, rest = name.partition(".")
    rate = 1.0
    if module == "backbone":
        distance = 0 if rest.startswith("norm") else depth + 1
        if rest.startswith("blocks."):
            distance = depth - int(rest.split(".")[1])
        rate = OPTIMIZER["layerwise_decay"] ** distance
        if rest.startswith("patch_embed"):
            rate *= OPTIMIZER["patch_embed_lr_multiplier"]
    undecayed = rest.endswith((".bias", ".gamma")) or "norm" in rest
    return {
        "lr_multiplier": rate,
        "weight_decay_multiplier": 0.0 if undecayed else 1.0,
        "is_last_layer": rest.startswith("last_layer"),
    }


def _adamw(student: Weights, gradients: Weights, groups: dict[str, Any]) -> Weights:
    """Clip by module, then AdamW's first step from its formula: both moments start at zero and are corrected for it."""
    after = {}
    for module in ("backbone", "dino_head", "ibot_head"):
        members = [name for name in gradients if name.startswith(f"{module}.")]
        norm = torch.stack([gradients[name].square().sum() for name in members]).sum().sqrt()
        factor = min(1.0, OPTIMIZER["clip_grad_norm_per_module"] / (float(norm) + 1e-6))
        for name in members:
            gradient = gradients[name] * factor
            lr = OPTIMIZER["lr"] * groups[name]["lr_multiplier"]
            decay = OPTIMIZER["weight_decay"] * groups[name]["weight_decay_multiplier"]
            after[name] = student[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
    return after
