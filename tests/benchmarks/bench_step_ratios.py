"""Time and memory of the loss part and of a whole step, ours over a straightforward implementation of the same maths.

    python -m tests.benchmarks.bench_step_ratios --batch 4 --prototypes 65536 --repeats 3 --threads 2

Both sides run one after the other in the same process, several times, and the smallest times are compared: machines
vary threefold, ratios within one run do not. Memory is what torch's allocator holds at most beyond what it held at the
start, so it does not depend on what the C library keeps.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import MeasuredStep, StepSize, random_batches, step_size
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from meddino.core.device import find_machine
from meddino.losses.dino import dino_terms
from meddino.losses.gram import gram_loss
from meddino.losses.ibot import ibot_term
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from tests.reference import plain

TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1


def peak_mib(work: Callable[[], object]) -> float:
    """Return the most that torch's allocator held beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def best_s(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the smallest time of each; they take turns."""
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for place, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


class LossPart:
    """From both heads' bottlenecks to the gradients: last layers, Sinkhorn-Knopp, DINO, iBOT, Gram."""

    def __init__(self, batch: int, prototypes: int, num_local: int, patches: int, masked: int, gram: bool) -> None:
        rng = torch.Generator().manual_seed(0)

        def unit(*shape: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, generator=rng), dim=-1).requires_grad_()

        self.batch, self.gram = batch, gram
        self.global_bottleneck, self.local_bottleneck = unit(2, batch, 256), unit(num_local, batch, 256)
        self.patch_bottleneck = unit(masked, 256)
        self.dino_weight, self.ibot_weight = unit(prototypes, 256), unit(prototypes, 256)
        self.teacher_cls, self.teacher_patches = unit(2 * batch, 256).detach(), unit(masked, 256).detach()
        self.teacher_weight = unit(prototypes, 256).detach()
        masks = torch.zeros(2 * batch, patches, dtype=torch.bool)
        masks.view(-1)[torch.randperm(masks.numel(), generator=rng)[:masked]] = True
        self.masks = masks
        self.tokens = torch.randn(2 * batch, patches, 384, generator=rng, requires_grad=True)
        self.anchors = torch.randn(2 * batch, patches, 384, generator=rng)

    @property
    def leaves(self) -> list[Tensor]:
        own = [self.global_bottleneck, self.local_bottleneck, self.patch_bottleneck, self.dino_weight, self.ibot_weight]
        return [*own, self.tokens] if self.gram else own

    def straightforward(self) -> tuple[Tensor, ...]:
        cls = plain.sinkhorn(self.teacher_cls @ self.teacher_weight.t(), TEACHER_TEMPERATURE).unflatten(0, (2, self.batch))
        patches = plain.sinkhorn(self.teacher_patches @ self.teacher_weight.t(), TEACHER_TEMPERATURE)
        loss = plain.dino(self.global_bottleneck @ self.dino_weight.t(), cls, STUDENT_TEMPERATURE, ignore_diagonal=True)
        loss = loss + plain.dino(self.local_bottleneck @ self.dino_weight.t(), cls, STUDENT_TEMPERATURE, ignore_diagonal=False)
        loss = loss + plain.ibot(self.patch_bottleneck @ self.ibot_weight.t(), patches, self.masks, STUDENT_TEMPERATURE)
        if self.gram:
            loss = loss + plain.gram(self.tokens, self.anchors)
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)

    def ours(self) -> tuple[Tensor, ...]:
        loss = dino_terms(
            self.global_bottleneck,
            self.local_bottleneck,
            self.dino_weight,
            sinkhorn_targets(TeacherLogits(self.teacher_cls, self.teacher_weight), TEACHER_TEMPERATURE),
            STUDENT_TEMPERATURE,
        ).weighted
        loss = loss + ibot_term(
            self.patch_bottleneck,
            self.ibot_weight,
            sinkhorn_targets(TeacherLogits(self.teacher_patches, self.teacher_weight), TEACHER_TEMPERATURE),
            (1 / self.masks.sum(1).clamp(min=1))[:, None].expand_as(self.masks)[self.masks],
            len(self.masks),
            STUDENT_TEMPERATURE,
        )
        if self.gram:
            loss = loss + gram_loss(self.tokens, self.anchors)
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)


class StraightforwardStep:
    """The same step as `bench step`'s, by the plain formulas, torch's default AdamW and two-pass averaging."""

    def __init__(self, step: MeasuredStep) -> None:
        method, views, extras = step.method, step.batches[0].views, step.batches[0].extras
        self.student = {name: value.detach().clone() for name, value in method.student.state_dict().items()}
        self.teacher = {name: value.detach().clone() for name, value in method.teacher.state_dict().items()}
        self.trained = [name for name, _ in method.student.named_parameters()]
        for name in self.trained:
            self.student[name].requires_grad_()
        gram = method.gram_teacher
        self.gram_teacher = {f"backbone.{name}": value for name, value in gram.state_dict().items()} if gram else {}
        self.crops = {**views, "masks": extras["masks"]}
        config = method.student.backbone.config
        temperature = step.values.own["teacher_temperature"]
        self.settings = plain.StepSettings(
            config.num_heads, len(step.batches[0].keys), temperature, STUDENT_TEMPERATURE, 1.0, 1.0, 0.1, 2.0, config.norm_eps
        )
        self.optimizer = torch.optim.AdamW([self.student[name] for name in self.trained], lr=step.values.lr, weight_decay=0.04)
        self.momentum = step.values.own["ema_momentum"]
        self.loss = float("nan")

    def run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses = plain.step_losses(self.student, self.teacher, self.gram_teacher, self.crops, self.settings)
        losses["total"].backward()
        self.loss = losses["total"].item()
        for module in ("backbone.", "dino_head.", "ibot_head."):
            torch.nn.utils.clip_grad_norm_([self.student[name] for name in self.trained if name.startswith(module)], 3.0)
        self.optimizer.step()
        with torch.no_grad():
            for name in self.trained:
                self.teacher[name].mul_(self.momentum).add_(self.student[name], alpha=1 - self.momentum)


def measure(
    name: str, plain_work: Callable[[], object], own_work: Callable[[], object], repeats: int
) -> dict[str, float | str]:
    """Return times and memory of both sides."""
    plain_s, own_s = best_s([plain_work, own_work], repeats)
    return {"what": name, "plain_s": plain_s, "own_s": own_s, "plain_mib": peak_mib(plain_work), "own_mib": peak_mib(own_work)}


def measure_all(size: StepSize, repeats: int, whole: bool) -> list[dict[str, float | str]]:
    """Return one row for each of: the loss part, the loss part with Gram, and, if asked for, the whole step."""
    crops = size.method.crops
    patches = random_batches(replace(size, batch=2), find_machine("cpu"))[0].extras["masks"].shape[1]
    masked = round(2 * size.batch * patches * 0.5 * 0.3)  # half of the images, 10 to 50 % of their patches
    rows = []
    for name, gram in (("loss part", False), ("loss part with Gram", True)):
        part = LossPart(size.batch, size.method.heads.dino.prototypes, crops.num_local, patches, masked, gram)
        _check(part.straightforward(), part.ours())
        rows.append(measure(name, part.straightforward, part.ours, repeats))
    if whole:
        own = MeasuredStep(copy.copy(size), find_machine("cpu"))
        own.method.student.backbone.rope_embed.rescale = None  # random; the plain side has none
        _raise_layer_scale(own)
        straightforward = StraightforwardStep(own)
        straightforward.run(), own.run()
        if abs(straightforward.loss / own.loss - 1) > 1e-4:
            raise RuntimeError(f"the two sides compute different losses: {straightforward.loss} and {own.loss}")
        rows.append(measure("whole step", straightforward.run, own.run, repeats))
    return rows


def _raise_layer_scale(step: MeasuredStep) -> None:
    """At 1e-5 the classes of all images are equal to within rounding, and so is KoLeo's loss a matter of rounding."""
    with torch.no_grad():
        for network in (step.method.student, step.method.teacher):
            for name, value in network.backbone.named_parameters():
                if name.endswith("gamma"):
                    value.fill_(0.1)


def _check(plain_results: tuple[Tensor, ...], own_results: tuple[Tensor, ...]) -> None:
    for one, other in zip(plain_results, own_results, strict=True):
        if not float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-8:
            raise RuntimeError("the two sides compute different numbers")


def as_table(rows: list[dict[str, float | str]]) -> str:
    """Return the rows with their ratios and the targets of the issue."""
    targets = {"loss part": "<= 0.7 time, <= 0.5 memory", "whole step": "<= 0.85 time"}
    head = f"{'what':<20}{'plain s':>9}{'ours s':>9}{'ratio':>7}{'plain MiB':>11}{'ours MiB':>10}{'ratio':>7}  target"
    lines = [head]
    for row in rows:
        name, plain_s, own_s, plain_mib, own_mib = row.values()
        target = targets["whole step" if name == "whole step" else "loss part"]
        lines.append(
            f"{name:<20}{plain_s:>9.3f}{own_s:>9.3f}{own_s / plain_s:>7.2f}{plain_mib:>11.0f}{own_mib:>10.0f}"
            f"{own_mib / plain_mib:>7.2f}  {target}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_step_ratios", description=__doc__.split("\n")[0])
    add_size_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--losses-only", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    sys.stdout.write(as_table(measure_all(step_size(given), given.repeats, whole=not given.losses_only)) + "\n")


if __name__ == "__main__":
    main()
