"""The maths written plainly from the formulas, over dicts of tensors with official names; shares no code with the project.

`tests/reference` makes records of its own with it, `tests/benchmarks` times it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class PlainTokens:
    cls_token: Tensor
    register_tokens: Tensor
    patch_tokens: Tensor
    block_patches: list[Tensor]


@dataclass(frozen=True)
class StepSettings:
    """What one step needs to know besides weights and crops."""

    num_heads: int
    batch: int
    teacher_temperature: float
    student_temperature: float
    dino: float
    ibot: float
    koleo: float
    gram: float
    norm_eps: float = 1e-6


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def layer_norm(x: Tensor, weights: Weights, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps)


def linear(x: Tensor, weights: Weights) -> Tensor:
    bias = weights.get("bias")
    if "bias_mask" in weights and bias is not None:
        bias = bias * weights["bias_mask"]
    return functional.linear(x, weights["weight"], bias)


def rope(x: Tensor, grid: tuple[int, int], prefix: int, periods: Tensor) -> Tensor:
    """Rotate [B, heads, tokens, d]; CLS and registers stay."""
    rows = (torch.arange(grid[0]) + 0.5) / grid[0] * 2 - 1
    columns = (torch.arange(grid[1]) + 0.5) / grid[1] * 2 - 1
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    angles = (2 * math.pi * coordinates[:, :, None] / periods).reshape(len(coordinates), -1)
    sin, cos = torch.cat([angles.sin()] * 2, -1), torch.cat([angles.cos()] * 2, -1)
    patches = x[:, :, prefix:]
    first, second = patches.chunk(2, -1)
    return torch.cat([x[:, :, :prefix], patches * cos + torch.cat([-second, first], -1) * sin], 2)


def attention(x: Tensor, weights: Weights, num_heads: int, grid: tuple[int, int], prefix: int, periods: Tensor) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = linear(x, below(weights, "qkv.")).reshape(batch, tokens, 3, num_heads, dim // num_heads)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    query, key = rope(query, grid, prefix, periods), rope(key, grid, prefix, periods)
    attended = functional.scaled_dot_product_attention(query, key, value)
    return linear(attended.transpose(1, 2).reshape(batch, tokens, dim), below(weights, "proj."))


def feed_forward(x: Tensor, weights: Weights) -> Tensor:
    if "w1.weight" in weights:
        gate = linear(x, below(weights, "w1."))
        return linear(gate * torch.sigmoid(gate) * linear(x, below(weights, "w2.")), below(weights, "w3."))
    return linear(functional.gelu(linear(x, below(weights, "fc1."))), below(weights, "fc2."))


def backbone(
    weights: Weights, images: Tensor, num_heads: int, mask: Tensor | None = None, eps: float = 1e-6, maps: bool = True
) -> PlainTokens:
    kernel = weights["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    grid = (images.shape[2] // side, images.shape[3] // side)
    patches = images.reshape(len(images), images.shape[1], grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(images), grid[0] * grid[1], -1)
    x = patches @ kernel.flatten(1).transpose(0, 1) + weights["patch_embed.proj.bias"]
    if mask is not None:
        x = torch.where(mask[..., None], weights["mask_token"], x)
    registers = weights.get("storage_tokens", x.new_zeros(1, 0, x.shape[-1]))
    x = torch.cat([token.expand(len(images), -1, -1) for token in (weights["cls_token"], registers)] + [x], 1)
    prefix = 1 + registers.shape[1]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    after = []
    for number in range(depth):
        block = below(weights, f"blocks.{number}.")
        normed = layer_norm(x, below(block, "norm1."), eps)
        attended = attention(normed, below(block, "attn."), num_heads, grid, prefix, weights["rope_embed.periods"])
        x = x + attended * block["ls1.gamma"]
        x = x + feed_forward(layer_norm(x, below(block, "norm2."), eps), below(block, "mlp.")) * block["ls2.gamma"]
        if maps:
            patch_map = layer_norm(x, below(weights, "norm."), eps)[:, prefix:].transpose(1, 2)
            after.append(patch_map.reshape(len(images), -1, *grid))
    normed = layer_norm(x, below(weights, "norm."), eps)
    return PlainTokens(normed[:, 0], normed[:, 1:prefix], normed[:, prefix:], after)


def head(weights: Weights, x: Tensor) -> Tensor:
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("mlp.")})
    for number in numbers:
        x = linear(x, below(weights, f"mlp.{number}."))
        if number != numbers[-1]:
            x = functional.gelu(x)
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    return x @ weights["last_layer.weight"].transpose(0, 1)


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, temperature: float = 0.1, ignore_diagonal: bool = False) -> Tensor:
    """Return the mean cross-entropy between every student crop [S, B, K] and every teacher crop [T, B, K] of an image."""
    log_probs = torch.log_softmax(student_logits / temperature, dim=-1)
    pairs = [(s, t) for s in range(len(student_logits)) for t in range(len(teacher_probs)) if not (ignore_diagonal and s == t)]
    return torch.stack([-(teacher_probs[t] * log_probs[s]).sum(-1).mean() for s, t in pairs]).mean()


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, mask_weights: Tensor, images: int, temperature: float = 0.1
) -> Tensor:
    """Return the cross-entropy on masked patches [m, K], averaged within each image and then over images."""
    each = -(teacher_probs * torch.log_softmax(student_logits / temperature, dim=-1)).sum(-1)
    return (each * mask_weights).sum() / images


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    q = torch.exp((logits - logits.max()) / temperature).t()
    prototypes, count = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / count
    return (q * count).t()


def dino(student: Tensor, teacher: Tensor, temperature: float, ignore_diagonal: bool) -> Tensor:
    """Mean over pairs of crops of -sum q log softmax(s)."""
    total, pairs = student.new_zeros(()), 0
    for s, logits in enumerate(student):
        for t, probabilities in enumerate(teacher):
            if ignore_diagonal and s == t:
                continue
            total = total - (probabilities * torch.log_softmax(logits / temperature, -1)).sum(-1).mean()
            pairs += 1
    return total / pairs


def ibot(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> Tensor:
    each = -(teacher * torch.log_softmax(student / temperature, -1)).sum(-1)
    counts = masks.sum(1)
    images = masks.nonzero()[:, 0]
    return (each / counts[images]).sum() / len(masks)


def koleo(features: Tensor) -> Tensor:
    x = features / features.square().sum(-1, keepdim=True).sqrt()
    total = x.new_zeros(())
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: (x[i] @ x[j]).item())
        total = total - torch.log((x[i] - x[nearest] + 1e-8).square().sum().sqrt() + 1e-8)
    return total / len(x)


def gram(student: Tensor, teacher: Tensor, batch_level: bool = False, negatives: str = "keep") -> Tensor:
    student = student / student.square().sum(-1, keepdim=True).sqrt()
    teacher = teacher / teacher.square().sum(-1, keepdim=True).sqrt()
    if batch_level:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    one, other = student @ student.transpose(-1, -2), teacher @ teacher.transpose(-1, -2)
    if negatives != "keep":
        other = other.clamp(min=0)
    if negatives == "remove":
        one = one.clamp(min=0)
    return (one - other).square().mean()


def resize(patch_map: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(patch_map, size=tuple(size), mode="bicubic", align_corners=False)


def step_losses(student: Weights, teacher: Weights, gram_teacher: Weights, crops: Weights, settings: StepSettings) -> Weights:
    """Return every term and the total of one step.

    Args:
        student: "backbone.", "dino_head.", "ibot_head." and then official names.
        teacher: The same.
        gram_teacher: "backbone." and official names; empty for no Gram term.
        crops: global_crops, local_crops, masks, and gram_teacher_crops with a Gram teacher; crop-major.
        settings: Weights, temperatures.
    """
    heads, batch, masks, eps = settings.num_heads, settings.batch, crops["masks"], settings.norm_eps
    with torch.no_grad():
        seen = backbone(below(teacher, "backbone."), crops["global_crops"], heads, eps=eps, maps=False)
        cls_targets = sinkhorn(head(below(teacher, "dino_head."), seen.cls_token), settings.teacher_temperature)
        patch_targets = sinkhorn(head(below(teacher, "ibot_head."), seen.patch_tokens[masks]), settings.teacher_temperature)
    of_global = backbone(below(student, "backbone."), crops["global_crops"], heads, masks, eps, maps=False)
    of_local = backbone(below(student, "backbone."), crops["local_crops"], heads, eps=eps, maps=False)
    global_logits = head(below(student, "dino_head."), of_global.cls_token).unflatten(0, (-1, batch))
    local_logits = head(below(student, "dino_head."), of_local.cls_token).unflatten(0, (-1, batch))
    patch_logits = head(below(student, "ibot_head."), of_global.patch_tokens[masks])
    targets = cls_targets.unflatten(0, (-1, batch))
    terms = {
        "dino_global_crops_loss": dino(global_logits, targets, settings.student_temperature, ignore_diagonal=True),
        "dino_local_crops_loss": dino(local_logits, targets, settings.student_temperature, ignore_diagonal=False),
        "ibot_loss": ibot(patch_logits, patch_targets, masks, settings.student_temperature),
        "koleo_loss": torch.stack([koleo(crop) for crop in of_global.cls_token.unflatten(0, (-1, batch))]).mean(),
    }
    global_pairs, local_pairs = 2, 2 * len(local_logits)
    total = settings.dino * global_pairs / (global_pairs + local_pairs) * terms["dino_global_crops_loss"]
    total = total + settings.dino * local_pairs / (global_pairs + local_pairs) * terms["dino_local_crops_loss"]
    total = total + settings.ibot * terms["ibot_loss"] + settings.koleo * 2 * terms["koleo_loss"]
    if gram_teacher:
        with torch.no_grad():
            images, side = crops["gram_teacher_crops"], student["backbone.patch_embed.proj.weight"].shape[-1]
            wide = backbone(below(gram_teacher, "backbone."), images, heads, eps=eps, maps=False).patch_tokens.transpose(1, 2)
            wide = wide.unflatten(2, (images.shape[2] // side, images.shape[3] // side))
            grid = (crops["global_crops"].shape[2] // side, crops["global_crops"].shape[3] // side)
            anchors = resize(wide, grid).flatten(2).transpose(1, 2)
        terms["gram_loss"] = gram(of_global.patch_tokens, anchors)
        total = total + settings.gram * terms["gram_loss"]
    return {**terms, "total": total}
