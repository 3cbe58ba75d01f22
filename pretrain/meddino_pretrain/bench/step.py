"""`meddino-pretrain bench step`: time, memory and arithmetic of whole training steps on random crops; one JSON line."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from meddino.core.command import command_parser, run_command
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import ConfigError
from meddino_pretrain.data.batches import Batch

if TYPE_CHECKING:
    from meddino_pretrain.methods.dinov3.network import DINOv3Network


@dataclass(frozen=True)
class StepSize:
    """What one measured step holds.

    Attributes:
        backbone: A name of `meddino.models.registry`.
        batch: Images.
        global_px: Side of the two global crops of each.
        local_px: Side of its local crops.
        num_local: Number of local crops.
        prototypes: Of both heads.
        gram: With a Gram teacher that sees the global crops at twice the side.
        drop_path: Share of samples that each residual branch leaves out.
        checkpointing: Recompute blocks in the backward pass.
        compiled: Blocks through torch.compile.
    """

    backbone: str
    batch: int
    global_px: int
    local_px: int
    num_local: int
    prototypes: int
    gram: bool = False
    drop_path: float = 0.0
    checkpointing: bool = False
    compiled: bool = False


def main(argv: Sequence[str]) -> int:
    """Run `bench step` and return its exit code."""
    parser = command_parser(
        "meddino-pretrain bench step",
        "Measure whole training steps (forward, backward, clipping, optimizer, EMA) on random crops; prints one JSON line.",
        "meddino-pretrain bench step --backbone vits16 --batch 4 --global-size 224 --local-size 96 --locals 8",
    )
    add_size_arguments(parser)
    parser.add_argument("--gram", action="store_true", help="with Gram anchoring, the Gram teacher at twice the size")
    parser.add_argument("--drop-path", type=float, default=0.0, help="share of samples each residual branch leaves out")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--compile", action="store_true", help="run the blocks through torch.compile")
    parser.add_argument("--steps", type=int, default=5, help="steps measured, after one that is not")
    parser.add_argument("--threads", type=int, default=None, help="threads of the CPU; all cores if left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return run_command(parser, argv, _bench_step)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command say what a step holds; `step_size` reads it."""
    parser.add_argument("--backbone", default="vits16", help="name of a backbone")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--global-size", type=int, default=224, help="side of the two global crops [px]")
    parser.add_argument("--local-size", type=int, default=96, help="side of the local crops [px]")
    parser.add_argument("--locals", type=int, default=8, help="local crops of each image")
    parser.add_argument("--prototypes", type=int, default=65536, help="prototypes of each head")


def step_size(arguments: argparse.Namespace) -> StepSize:
    """Return what a step holds, from the arguments of `add_size_arguments`."""
    return StepSize(
        arguments.backbone,
        arguments.batch,
        arguments.global_size,
        arguments.local_size,
        arguments.locals,
        arguments.prototypes,
    )


def _bench_step(arguments: argparse.Namespace) -> None:
    use_cpu_threads(arguments.threads)
    size = replace(
        step_size(arguments),
        gram=arguments.gram,
        drop_path=arguments.drop_path,
        checkpointing=arguments.checkpointing,
        compiled=arguments.compile,
    )
    sys.stdout.write(json.dumps(bench_step(size, arguments.steps, find_machine(arguments.device))) + "\n")


def bench_step(size: StepSize, steps: int, machine: Machine) -> dict[str, Any]:
    """Run some steps and return the figures.

    Args:
        size: What a step holds.
        steps: How many are measured; one more before them is not.
        machine: Where to run.

    Returns:
        s_per_step_min, s_per_step_median, peak_mib (the whole process on a CPU), tflops (`model_flops` over the fastest
        step, in 10^12 a second), share_of_peak (of what torch.mm reaches in the same process; it can be above 1 where
        `meddino.layers.linear` has a faster product), share_of_own_peak (of what that product reaches), and what was
        measured.

    Raises:
        ConfigError: If a number is out of range, or a side no multiple of the patch size.
    """
    if min(steps, size.batch - 1, size.prototypes) < 1 or size.num_local < 0:
        raise ConfigError("bench step needs steps >= 1, batch >= 2 (KoLeo compares images), prototypes >= 1, locals >= 0")
    step = MeasuredStep(size, machine)
    step.run()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step.run()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    peak_mib = machine.peak_memory_mib()
    operations, reachable = model_flops(step.objective.student, step.batch, size.gram), peak_flops(machine)
    return {
        "s_per_step_min": min(times),
        "s_per_step_median": statistics.median(times),
        "peak_mib": peak_mib,
        "tflops": operations / min(times) / 1e12,
        "share_of_peak": operations / min(times) / reachable["mm"],
        "share_of_own_peak": operations / min(times) / reachable["product"],
        "mm_tflops": reachable["mm"] / 1e12,
        "product_tflops": reachable["product"] / 1e12,
        "tflop_per_step": operations / 1e12,
        "images_per_s": size.batch / min(times),
        "loss": step.loss,
        "device": str(machine.device),
        "threads": torch.get_num_threads(),
        **size.__dict__,
    }


def model_flops(student: "DINOv3Network", batch: Batch, gram: bool) -> float:
    """Return the operations that a step's matrix products need, whatever is computed twice to save memory.

    The student's forward pass three times (its backward pass has two products for each), the teacher's and the Gram
    teacher's once; counted by running the networks' shapes on torch's meta device. Drop path is not taken off.

    Args:
        student: The student, which the teacher resembles.
        batch: The step's crops.
        gram: Whether there is a Gram teacher.
    """
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    network = copy.deepcopy(student).to("meta", batch.global_crops.dtype).eval()

    def count(crops: torch.Tensor, masked: int) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            seen = network.backbone(crops.to("meta"))
            if masked >= 0:
                network.dino_head(seen.cls_token)
                network.ibot_head(torch.empty(masked, seen.cls_token.shape[1], device="meta"))
        return float(counter.get_total_flops())

    of_global = count(batch.global_crops, len(batch.mask_indices))
    of_local = count(batch.local_crops, 0) if len(batch.local_crops) else 0.0
    of_gram = count(batch.gram_teacher_crops, -1) if gram and batch.gram_teacher_crops is not None else 0.0
    return 3 * (of_global + of_local) + of_global + of_gram


def peak_flops(machine: Machine, side: int = 2048, repeats: int = 5) -> dict[str, float]:
    """Return how many operations a second a large product reaches in the arithmetic of training: torch.mm, and ours."""
    from meddino.layers.linear import product

    left, right = (torch.randn(side, side, device=machine.device, dtype=machine.compute_dtype) for _ in range(2))
    best: dict[str, float] = {}
    for name, multiply in (("mm", torch.mm), ("product", product)):
        multiply(left, right)
        times = []
        for _ in range(repeats):
            machine.synchronize()
            start = time.perf_counter()
            multiply(left, right)
            machine.synchronize()
            times.append(time.perf_counter() - start)
        best[name] = 2.0 * side**3 / min(times)
    return best


class MeasuredStep:
    """A training step through the trainer's own objective, clipping, optimizer and teacher update."""

    def __init__(self, size: StepSize, machine: Machine) -> None:
        import copy

        from meddino.layers.projection_head import ProjectionHead
        from meddino.models.registry import vit_config
        from meddino.models.vision_transformer import VisionTransformer
        from meddino_pretrain.data.sampler import BatchShare
        from meddino_pretrain.methods.dinov3.config import DINOv3Config
        from meddino_pretrain.methods.dinov3.method import DINOv3Objective
        from meddino_pretrain.methods.dinov3.network import DINOv3Network
        from meddino_pretrain.optimizer import build_optimizer, parameter_rules, set_rates
        from meddino_pretrain.schedules import StepValues

        torch.manual_seed(0)
        backbone = VisionTransformer(vit_config(size.backbone, drop_path=size.drop_path))
        heads = (ProjectionHead(backbone.embed_dim, size.prototypes) for _ in range(2))
        student = DINOv3Network(backbone, *heads).to(machine.device)
        teacher = copy.deepcopy(student)
        gram_teacher = copy.deepcopy(student.backbone) if size.gram else None
        if size.checkpointing:
            backbone.recompute_activations()
        if size.compiled:
            for network in (student.backbone, teacher.backbone):
                for block in network.parts():
                    block.compile()
        config = DINOv3Config(
            dino_weight=1.0,
            dino_local_multiplier=1.0,
            ibot_weight=1.0,
            koleo_weight=0.1,
            gram_weight=2.0 if size.gram else 0.0,
            gram_negatives="keep",
            student_temperature=0.1,
        )
        self.values = StepValues(1e-4, 0.04, 0.994, 0.07, 1.0, 1.0)
        self.objective = DINOv3Objective(student, teacher, gram_teacher, config, machine, BatchShare(size.batch), seed=0)
        self.optimizer = build_optimizer(self.objective.trained, parameter_rules(self.objective.trained), fused=True)
        set_rates(self.optimizer, self.values.lr, self.values.weight_decay)
        self.batch = random_batch(size, backbone.patch_size, backbone.config.in_chans, machine)
        self.step = 0
        self.loss = float("nan")

    def run(self) -> None:
        """Take one step."""
        from meddino_pretrain.optimizer import clip_by_module

        self.optimizer.zero_grad(set_to_none=True)
        for losses in self.objective.losses([self.batch], self.values, self.step):
            losses["total"].backward()  # type: ignore[no-untyped-call]
            self.loss = float(losses["total"].detach())
        clip_by_module(self.objective.trained, 3.0)
        self.optimizer.step()
        self.objective.after_step(self.values)
        self.step += 1


def random_batch(size: StepSize, patch_size: int, in_chans: int, machine: Machine) -> Batch:
    """Return noise in the shape of a batch; half of the global crops have masks, 10 to 50 % of their patches.

    Raises:
        ConfigError: If a side is no multiple of the patch size.
    """
    from meddino.losses.ibot import mask_weights_of

    if size.global_px % patch_size or (size.num_local and size.local_px % patch_size):
        raise ConfigError(f"crops of {size.global_px} and {size.local_px} px do not divide into patches of {patch_size} px")
    rng = torch.Generator().manual_seed(1)

    def crops(count: int, side: int) -> torch.Tensor:
        return torch.randn(count, in_chans, side, side, generator=rng).to(machine.device)

    patches = (size.global_px // patch_size) ** 2
    masks = torch.zeros(2 * size.batch, patches, dtype=torch.bool)
    masked = range(0, 2 * size.batch, 2)
    for place, image in enumerate(masked):
        count = round(patches * (0.1 + 0.4 * (place + 0.5) / len(masked)))
        masks[image, torch.randperm(patches, generator=rng)[:count]] = True
    return Batch(
        step=0,
        micro_step=0,
        global_crops=crops(2 * size.batch, size.global_px),
        local_crops=crops(size.num_local * size.batch, size.local_px),
        gram_teacher_crops=crops(2 * size.batch, 2 * size.global_px) if size.gram else None,
        masks=masks.to(machine.device),
        mask_indices=masks.flatten().nonzero().flatten().to(machine.device),
        mask_weights=mask_weights_of(masks).to(machine.device),
        keys=[str(image) for image in range(size.batch)],
        data_wait_s=0.0,
    )
