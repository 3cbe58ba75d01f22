"""`meddino-pretrain bench step`: time, memory and arithmetic of whole training steps on random images; one JSON line."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import ConfigError
from meddino.core.machine_config import Compile, MachineConfig
from meddino.distributed.collectives import all_reduce_mean, rank, world_size
from meddino_pretrain.bench import method_config
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.base import Method, StageSetting, shapes_of
from meddino_pretrain.methods.config import MethodConfig

DEFAULT = MachineConfig()


@dataclass(frozen=True)
class StepSize:
    """What one measured step holds.

    Attributes:
        backbone: A name of `meddino.models.registry`.
        batch: Images, over all processes.
        method: Views, heads and terms.
        changes: Of the backbone's architecture.
        accumulation: Micro-batches in which each process computes them.
    """

    backbone: str
    batch: int
    method: MethodConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    accumulation: int = 1

    @property
    def share(self) -> BatchShare:
        """This process's part of the images."""
        return BatchShare(self.batch, rank(), world_size(), self.accumulation)


def step_size(arguments: argparse.Namespace) -> StepSize:
    """Return what a step holds, from the arguments of `bench.commands.step`."""
    # Only a backbone that has drop path is asked for it.
    changes = {"drop_path": arguments.drop_path} if arguments.drop_path else {}
    return StepSize(arguments.backbone, arguments.batch, method_config(arguments), changes)


def run(arguments: argparse.Namespace) -> None:
    """Measure steps and print the figures; see `bench.commands.step`."""
    use_cpu_threads(arguments.threads)
    # As the trainer would: compiled on a CUDA device unless told otherwise.
    asked: dict[str, Compile] = {"auto": "auto", "on": True, "off": False}
    config = MachineConfig(activation_checkpointing=arguments.checkpointing, compile=asked[arguments.compile])
    figures = bench_step(step_size(arguments), arguments.steps, find_machine(arguments.device), config)
    given = {name: value for name, value in vars(arguments).items() if name not in ("steps", "device", "threads")}
    sys.stdout.write(json.dumps({**figures, **given}) + "\n")


def bench_step(size: StepSize, steps: int, machine: Machine, config: MachineConfig = DEFAULT) -> dict[str, Any]:
    """Run some steps and return the figures.

    Args:
        size: What a step holds.
        steps: How many are measured; one more before them is not.
        machine: Where to run.
        config: Checkpointing and compiling.

    Returns:
        s_per_step_min, s_per_step_median, peak_mib (the whole process on a CPU), tflops (`Method.flops` over the fastest
        step, in 10^12 a second), share_of_peak (of what torch.mm reaches in the same process; it can be above 1 where
        `meddino.layers.linear` has a faster product), share_of_own_peak (of what that product reaches), and where it ran.

    Raises:
        ConfigError: If a number is out of range, or a side no multiple of the patch size.
    """
    if min(steps, size.batch - 1) < 1:
        raise ConfigError("bench step needs steps >= 1 and batch >= 2 (images are compared with one another)")
    step = MeasuredStep(size, machine, config)
    step.run()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step.run()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    peak_mib = machine.peak_memory_mib()
    operations = shapes_of(lambda: build_method(size, machine)).flops(step.batches[0])
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
    from meddino_pretrain.monitoring.speed import PEAK_SIDE_ACCELERATOR, product_speed

    side = PEAK_SIDE_ACCELERATOR if machine.is_accelerator else 2048
    return {"mm": product_speed(machine, torch.mm, side), "product": product_speed(machine, product, side)}


class MeasuredStep:
    """A training step through the trainer's own method, clipping, optimizer and teacher update."""

    def __init__(self, size: StepSize, machine: Machine, config: MachineConfig = DEFAULT) -> None:
        from meddino_pretrain.build import spread_method
        from meddino_pretrain.optimizer import build_optimizer, parameter_rules, set_rates
        from meddino_pretrain.schedules import StepValues

        torch.manual_seed(0)
        self.method = build_method(size, machine)
        spread_method(self.method, config, machine)
        modules = self.method.trainable()
        self.values = StepValues(1e-4, 0.04, own=self.method.scheduled(0))
        self.optimizer = build_optimizer(modules, parameter_rules(modules), fused=True)
        set_rates(self.optimizer, self.values)
        self.batches = random_batches(size, machine)
        self.step = 0
        self.loss = float("nan")
        self.norms: dict[str, Tensor] = {}

    def run(self) -> None:
        """Take one step."""
        from meddino_pretrain.optimizer import clip_by_module

        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.method.machine.device)
        for losses in self.method.losses(self.batches, self.values, self.step):
            torch.autograd.backward(losses["total"] / len(self.batches))
            total += losses["total"].detach() / len(self.batches)
        self.loss = float(all_reduce_mean(total))
        self.norms = clip_by_module(self.method.trainable(), 3.0)
        self.optimizer.step()
        self.method.after_step(self.values)
        self.step += 1


def build_method(size: StepSize, machine: Machine) -> Method:
    """Return the method with fresh weights."""
    from meddino.models.registry import build_backbone

    backbone = build_backbone(size.backbone, **size.changes)
    return method_class(size.method).build(size.method, backbone, StageSetting(1, 0, size.share, machine))


def random_batches(size: StepSize, machine: Machine) -> list[Batch]:
    """Return noise in the shape of this process's micro-batches, with what the method adds to it.

    Each image is the same whatever the number of processes and micro-batches.

    Raises:
        ConfigError: If a side is no multiple of the patch size.
    """
    from meddino.models.registry import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(size.backbone, **size.changes)
    method = method_class(size.method)
    spec = method.views(size.method)
    spec.check_sides(backbone.multiple_px, "bench step")
    sides, rng = spec.sizes_for_step(0, 0), torch.Generator().manual_seed(1)
    noise = {
        name: torch.randn(view.count * size.batch, 3, sides[name], sides[name], generator=rng)
        for name, view in spec.views.items()
    }
    batches = []
    for micro_step in range(size.accumulation):
        samples = size.share.samples(micro_step)
        views = {name: _rows_of(images, samples, size.batch) for name, images in noise.items()}
        keys = [str(image) for image in samples]
        raw = RawBatch(0, micro_step, samples, {name: images[:, 0] for name, images in views.items()}, {}, keys)
        raw = method.collate(size.method, backbone.patch_size, raw, SampleOrder(0, size.batch, size.batch))
        batches.append(Batch(0, micro_step, _there(views, machine), keys, extras=_there(raw.extras, machine)))
    return batches


def _rows_of(images: Tensor, samples: range, batch: int) -> Tensor:
    """Return the views of some samples; rows are crop-major."""
    return images.view(-1, batch, *images.shape[1:])[:, samples.start : samples.stop].flatten(0, 1)


def _there(tensors: Mapping[str, Tensor], machine: Machine) -> dict[str, Tensor]:
    return {name: tensor.to(machine.device) for name, tensor in tensors.items()}
