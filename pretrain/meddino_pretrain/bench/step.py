"""`meddino-pretrain bench step`: time, memory and arithmetic of whole training steps on random images; one JSON line."""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import ConfigError
from meddino.core.machine_config import MachineConfig
from meddino_pretrain.bench import method_config
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.base import Method, StageSetting, shapes_of
from meddino_pretrain.methods.config import MethodConfig


@dataclass(frozen=True)
class StepSize:
    """What one measured step holds.

    Attributes:
        backbone: A name of `meddino.models.registry`.
        batch: Images.
        method: Views, heads and terms.
        drop_path: Share of samples that each residual branch leaves out.
        checkpointing: Recompute layers in the backward pass.
        compiled: Layers through torch.compile.
    """

    backbone: str
    batch: int
    method: MethodConfig
    drop_path: float = 0.0
    checkpointing: bool = False
    compiled: bool = False


def step_size(arguments: argparse.Namespace) -> StepSize:
    """Return what a step holds, from the arguments of `bench.commands.step`."""
    return StepSize(
        arguments.backbone,
        arguments.batch,
        method_config(arguments),
        getattr(arguments, "drop_path", 0.0),
        getattr(arguments, "checkpointing", False),
        getattr(arguments, "compile", False),
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure steps and print the figures; see `bench.commands.step`."""
    use_cpu_threads(arguments.threads)
    figures = bench_step(step_size(arguments), arguments.steps, find_machine(arguments.device))
    given = {name: value for name, value in vars(arguments).items() if name not in ("steps", "device", "threads")}
    sys.stdout.write(json.dumps({**figures, **given}) + "\n")


def bench_step(size: StepSize, steps: int, machine: Machine) -> dict[str, Any]:
    """Run some steps and return the figures.

    Args:
        size: What a step holds.
        steps: How many are measured; one more before them is not.
        machine: Where to run.

    Returns:
        s_per_step_min, s_per_step_median, peak_mib (the whole process on a CPU), tflops (`Method.flops` over the fastest
        step, in 10^12 a second), share_of_peak (of what torch.mm reaches in the same process; it can be above 1 where
        `meddino.layers.linear` has a faster product), share_of_own_peak (of what that product reaches), and where it ran.

    Raises:
        ConfigError: If a number is out of range, or a side no multiple of the patch size.
    """
    if min(steps, size.batch - 1) < 1:
        raise ConfigError("bench step needs steps >= 1 and batch >= 2 (images are compared with one another)")
    step = MeasuredStep(size, machine)
    step.run()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step.run()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    peak_mib = machine.peak_memory_mib()
    operations = shapes_of(lambda: build_method(size, machine)).flops(step.batch)
    reachable = peak_flops(machine)
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
    }


def peak_flops(machine: Machine) -> dict[str, float]:
    """Return how many operations a second a large product reaches in the arithmetic of training: torch.mm, and ours."""
    from meddino.layers.linear import product
    from meddino_pretrain.monitoring.speed import product_speed

    return {"mm": product_speed(machine, torch.mm), "product": product_speed(machine, product)}


class MeasuredStep:
    """A training step through the trainer's own method, clipping, optimizer and teacher update."""

    def __init__(self, size: StepSize, machine: Machine) -> None:
        from meddino_pretrain.build import spread_method
        from meddino_pretrain.optimizer import build_optimizer, parameter_rules, set_rates
        from meddino_pretrain.schedules import StepValues

        torch.manual_seed(0)
        self.method = build_method(size, machine)
        spread_method(self.method, MachineConfig(activation_checkpointing=size.checkpointing, compile=size.compiled), machine)
        modules = self.method.trainable()
        self.values = StepValues(1e-4, 0.04, own=self.method.scheduled(0))
        self.optimizer = build_optimizer(modules, parameter_rules(modules), fused=True)
        set_rates(self.optimizer, self.values)
        self.batch = random_batch(size, machine)
        self.step = 0
        self.loss = float("nan")

    def run(self) -> None:
        """Take one step."""
        from meddino_pretrain.optimizer import clip_by_module

        self.optimizer.zero_grad(set_to_none=True)
        for losses in self.method.losses([self.batch], self.values, self.step):
            losses["total"].backward()  # type: ignore[no-untyped-call]
            self.loss = float(losses["total"].detach())
        clip_by_module(self.method.trainable(), 3.0)
        self.optimizer.step()
        self.method.after_step(self.values)
        self.step += 1


def build_method(size: StepSize, machine: Machine) -> Method:
    """Return the method with fresh weights."""
    from meddino.models.registry import build_backbone

    # Only a backbone that has drop path is asked for it.
    changes = {"drop_path": size.drop_path} if size.drop_path else {}
    backbone = build_backbone(size.backbone, **changes)
    return method_class(size.method).build(size.method, backbone, StageSetting(1, 0, BatchShare(size.batch), machine))


def random_batch(size: StepSize, machine: Machine) -> Batch:
    """Return noise in the shape of a batch, with what the method adds to it.

    Raises:
        ConfigError: If a side is no multiple of the patch size.
    """
    from meddino.models.registry import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(size.backbone)
    method = method_class(size.method)
    spec = method.views(size.method)
    spec.check_sides(backbone.multiple_px, "bench step")
    sides, rng = spec.sizes_for_step(0, 0), torch.Generator().manual_seed(1)
    shapes = {name: (view.count * size.batch, sides[name], sides[name]) for name, view in spec.views.items()}
    stored = {name: torch.zeros(shape, dtype=torch.int16) for name, shape in shapes.items()}
    keys = [str(image) for image in range(size.batch)]
    raw = RawBatch(0, 0, range(size.batch), stored, {}, keys)
    raw = method.collate(size.method, backbone.patch_size, raw, SampleOrder(0, size.batch, size.batch))
    return Batch(
        step=0,
        micro_step=0,
        views={
            name: torch.randn(rows, 3, height, width, generator=rng).to(machine.device)
            for name, (rows, height, width) in shapes.items()
        },
        keys=keys,
        extras={name: value.to(machine.device) for name, value in raw.extras.items()},
    )
