"""What each thing that makes a step cheap saves: time and memory before and after it, all else equal.

    python -m tests.benchmarks.bench_step_parts --backbone vits16 --batch 4 --prototypes 65536 --threads 2 [--compile]

Both sides of a row take turns in one process; times are the smallest of several, memory is what torch's allocator holds at
most beyond what it held at the start. `bench_step_ratios` has the same for the step as a whole.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import StepSize, random_batches, step_size
from meddino_pretrain.methods.ema import update_teacher
from meddino_pretrain.optimizer import build_optimizer, parameter_rules, set_rates
from meddino_pretrain.schedules import StepValues
from torch import Tensor, nn

from meddino.core.device import find_machine
from meddino.layers.cpu import lean_branches as lean_module
from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.layers.projection_head import ProjectionHead
from meddino.losses.gram import gram_loss
from meddino.losses.ibot import ibot_term
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from meddino.models.registry import build_backbone
from meddino.models.vision_transformer import VisionTransformer
from tests.benchmarks.bench_step_ratios import best_s, peak_mib
from tests.reference import plain

Work = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """One row: a name, the work before, the work after."""

    name: str
    before: Work
    after: Work


def forward_and_backward(backbone: VisionTransformer, groups: list[list[Tensor]], draws: list[DropPathPlan]) -> None:
    """Run each list of crop groups through the backbone, one list after the other, and back."""
    for crops, own_draws in zip(groups, draws, strict=True):
        outputs = backbone.forward_crops(crops, plan=own_draws)
        sum((output.cls_token.sum() + output.patch_tokens.square().sum() for output in outputs), torch.zeros(())).backward()
    backbone.zero_grad(set_to_none=True)


@contextmanager
def plain_branches() -> Iterator[None]:
    """Have blocks call their modules one by one, whose gradients autograd works out."""
    own = lean_module.is_lean
    lean_module.is_lean = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        lean_module.is_lean = own  # type: ignore[assignment]


def backbone_parts(size: StepSize, compiled: bool) -> list[Part]:
    """Packed crops, drop path, blocks with gradients of their own, activation checkpointing, compilation."""
    torch.manual_seed(0)
    backbone, dropping = build_backbone(size.backbone), build_backbone(size.backbone, drop_path=0.3)
    checkpointing = copy.deepcopy(backbone)
    checkpointing.recompute_activations()
    batch = random_batches(size, find_machine("cpu"))[0]
    crops = [batch.views["global_crops"], batch.views["local_crops"]]
    numbers = tuple(CropIndices(tuple(range(len(images))), len(images)) for images in crops)
    draws = DropPathPlan(0, 0, numbers)

    def together(model: VisionTransformer) -> Work:
        return lambda: forward_and_backward(model, [crops], [draws])

    def apart() -> None:
        forward_and_backward(backbone, [[images] for images in crops], [DropPathPlan(0, 0, (number,)) for number in numbers])

    def without_lean() -> None:
        with plain_branches():
            together(backbone)()

    parts = [
        Part("crops packed: linear layers once", apart, together(backbone)),
        Part("drop path 0.3: dropped not computed", together(backbone), together(dropping)),
        Part("blocks with gradients of their own", without_lean, together(backbone)),
        Part("activation checkpointing", together(backbone), together(checkpointing)),
    ]
    if compiled:
        fast = copy.deepcopy(backbone)
        for layer in fast.blocks:
            layer.compile()
        together(fast)()  # compiled here, not in the measured time
        parts.append(Part("torch.compile", together(backbone), together(fast)))
    return parts


def loss_parts(size: StepSize) -> list[Part]:
    """Sinkhorn-Knopp, cross-entropy over prototypes, Gram."""
    rng = torch.Generator().manual_seed(0)
    patches = (size.method.crops.sizes[0].global_px // 16) ** 2
    rows = round(2 * size.batch * patches * 0.15)
    features = nn.functional.normalize(torch.randn(rows, 256, generator=rng), dim=-1).requires_grad_()
    weight = nn.functional.normalize(
        torch.randn(size.method.heads.dino.prototypes, 256, generator=rng), dim=-1
    ).requires_grad_()
    logits = features.detach().flip(0) @ weight.detach().t()
    tokens = torch.randn(2 * size.batch, patches, 384, generator=rng, requires_grad=True)
    anchors = torch.randn(2 * size.batch, patches, 384, generator=rng)
    masks = torch.zeros(2 * size.batch, patches, dtype=torch.bool)
    masks.view(-1)[torch.randperm(masks.numel(), generator=rng)[:rows]] = True
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    targets, probabilities = sinkhorn_targets(TeacherLogits(logits.clone()), 0.07), plain.sinkhorn(logits, 0.07)

    def cross_entropy() -> Tensor:
        return torch.autograd.grad(plain.ibot(features @ weight.t(), probabilities, masks, 0.1), [features, weight])[1]

    def in_chunks() -> Tensor:
        loss = ibot_term(features, weight, targets, weights, len(masks), 0.1)
        return torch.autograd.grad(loss, [features, weight])[1]

    return [
        Part(
            "Sinkhorn: scaling vectors",
            lambda: plain.sinkhorn(logits, 0.07),
            lambda: sinkhorn_targets(TeacherLogits(logits), 0.07),
        ),
        Part("cross-entropy in chunks", cross_entropy, in_chunks),
        Part(
            "Gram per image",
            lambda: torch.autograd.grad(plain.gram(tokens, anchors), tokens),
            lambda: torch.autograd.grad(gram_loss(tokens, anchors), tokens),
        ),
    ]


def update_parts(size: StepSize) -> list[Part]:
    """AdamW and the teacher's average over backbone and heads."""
    torch.manual_seed(0)
    backbone = build_backbone(size.backbone)
    modules = {"backbone": backbone, "head": ProjectionHead(backbone.embed_dim, size.method.heads.dino.prototypes)}
    student = nn.ModuleDict(modules)
    teacher = copy.deepcopy(student)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    one_by_one = torch.optim.AdamW(student.parameters(), lr=1e-6, foreach=False)
    fused = build_optimizer(modules, parameter_rules(modules), fused=True)
    set_rates(fused, StepValues(1e-6, 0.01))

    @torch.no_grad()
    def two_passes() -> None:
        for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
            target.mul_(0.994).add_(source, alpha=0.006)

    return [
        Part("AdamW fused", one_by_one.step, fused.step),
        Part("teacher's average in one pass", two_passes, lambda: update_teacher(student, teacher, 0.994)),
    ]


def as_table(parts: list[Part], repeats: int) -> Iterator[str]:
    """Yield one line a part as it is measured."""
    yield f"{'what':<38}{'before s':>10}{'after s':>10}{'ratio':>7}{'before MiB':>12}{'after MiB':>11}{'ratio':>7}"
    for part in parts:
        part.before(), part.after()
        before_s, after_s = best_s([part.before, part.after], repeats)
        before, after = peak_mib(part.before), peak_mib(part.after)
        memory = f"{after / before:>7.2f}" if before >= 1 else f"{'-':>7}"
        yield f"{part.name:<38}{before_s:>10.3f}{after_s:>10.3f}{after_s / before_s:>7.2f}{before:>12.0f}{after:>11.0f}{memory}"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_step_parts", description=__doc__.split("\n")[0])
    add_size_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also torch.compile: takes a minute to compile")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    size = step_size(given)
    parts = [*backbone_parts(size, given.compile), *loss_parts(size), *update_parts(size)]
    for line in as_table(parts, given.repeats):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
