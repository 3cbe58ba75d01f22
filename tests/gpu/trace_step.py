"""What a training step would cost a GPU, from shapes alone; prints one JSON line.

    python -m tests.gpu.trace_step --backbone vitl16 --batch 64 --global-size 256 --local-size 112 --locals 8 \
        --prototypes 65536 --drop-path 0.2 [--gram-size 512] [--checkpointing [selective]] [--accumulation 4] [--lines 30]

GB touched and kernels are of the second step, when AdamW's moments are there; see `tests.gpu.tracing` for what is counted.
"""

import argparse
import gc
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from meddino_pretrain import trainer as trainer_module
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import StepSize, build_method, step_size
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.batches import Batch, ModelInput, RawBatch
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.base import Method, backbones_in
from meddino_pretrain.methods.dinov3 import method as dinov3_method
from meddino_pretrain.methods.dinov3 import network as dinov3_network
from meddino_pretrain.methods.dinov3.config import DINOv3Config
from meddino_pretrain.optimizer import build_optimizer, parameter_rules
from meddino_pretrain.schedules import StepValues
from torch import Tensor

from meddino.core.device import Machine
from meddino.losses import prototype_cross_entropy, sinkhorn
from meddino.models.registry import build_backbone
from tests.gpu.tracing import Ledger, as_compiled, in_phase, meta_device

META = torch.device("meta")
# Whose functions are told apart while a step is traced.
PATCHED = (dinov3_method, dinov3_network, trainer_module, torch.autograd, sinkhorn, prototype_cross_entropy)


class Parts:
    """What the trainer asks of its schedules, of its guard and of what hears signals."""

    def __init__(self, values: StepValues) -> None:
        self.values, self.stop = values, self

    def came(self) -> bool:
        return False

    def at(self, *_: Any) -> StepValues:
        return self.values


def figures_of(ledger: Ledger) -> dict[str, Any]:
    """Return the counts of a step; by phase: kernels, GB touched, the same compiled, peak GB."""

    def gb(number: float) -> float:
        return round(number / 1e9, 6)

    ways = Counter[str]()
    for (way, *_), number in ledger.copies.items():
        ways[way] += number
    return {
        "kernels": ledger.kernels.total(),
        "gb_touched": gb(ledger.bytes.total()),
        "gb_touched_compiled": gb(ledger.compiled.total()),
        "peak_gb": gb(ledger.peak),
        "host_waits": ledger.waits.total(),
        "device_copies": {"to device": ways["to device"], "to host": ways["to host"]},
        "by_phase": {
            phase: [ledger.kernels[phase], gb(ledger.bytes[phase]), gb(ledger.compiled[phase]), gb(held)]
            for phase, (held, _) in ledger.peaks.items()
        },
    }


def recipe_size(config: PretrainConfig, stage: str, processes: int) -> StepSize:
    """Return a stage's step in its largest crops: this process's, of so many, in two micro-batches at most.

    More than two add what is kept of each: its bottlenecks, a thousandth of what a micro-batch takes.
    """
    of = config.stages[stage]
    method = of.method
    assert isinstance(method, DINOv3Config)
    largest = max(method.crops.sizes, key=lambda sizes: (sizes.global_px, sizes.local_px))
    method = method.model_copy(update={"crops": method.crops.model_copy(update={"sizes": (largest,)})})
    accumulation = min(of.accumulation, 2)
    micro_batch = of.global_batch // (processes * of.accumulation)
    return StepSize(config.backbone.name, micro_batch * accumulation, method, config.backbone.changes, accumulation)


def with_crops(size: StepSize, **px: int | None) -> StepSize:
    """Return a step with other crop sizes."""
    crops = size.method.crops  # type: ignore[attr-defined]
    sizes = tuple(each.model_copy(update=px) for each in crops.sizes)
    return replace(size, method=size.method.model_copy(update={"crops": crops.model_copy(update={"sizes": sizes})}))


def figures_at_depth(size: StepSize, checkpointing: bool | str = False, depths: tuple[int, int] = (2, 4)) -> dict[str, float]:
    """Return the totals of a step's figures from two shallower networks: every block adds the same (a test shows it).

    To the peak of each phase too; which of them is the highest may change with the depth.
    """
    shallower = [replace(size, changes={**size.changes, "depth": depth}) for depth in depths]
    few, more = (figures_of(trace_step(each, checkpointing)) for each in shallower)
    with META:
        steps = (build_backbone(size.backbone, **size.changes).depth - depths[0]) / (depths[1] - depths[0])

    def whole(first: float, second: float) -> float:
        return first + steps * (second - first)

    totals = {name: whole(few[name], more[name]) for name in ("kernels", "gb_touched", "gb_touched_compiled")}
    peaks = [whole(few["by_phase"][phase][-1], more["by_phase"][phase][-1]) for phase in few["by_phase"]]
    return {**totals, "peak_gb": max(peaks)}


def micro_batches(size: StepSize, patch_size: int) -> list[Batch]:
    """Return batches whose masks are real and whose pixels are shapes, as the loader and the device would make them."""
    kind = method_class(size.method)
    views = kind.views(size.method)
    sides = views.sizes_for_step(0, 0)
    keep, batches = size.accumulation == 1, []
    for micro_step in range(size.accumulation):
        samples = size.share.samples(micro_step)
        shapes = {
            name: torch.Size((view.count * len(samples), 3, sides[name], sides[name])) for name, view in views.views.items()
        }
        stored = {name: torch.empty(shape[0], *shape[2:], dtype=torch.int16, device=META) for name, shape in shapes.items()}
        raw = RawBatch(0, micro_step, samples, stored, {}, [str(number) for number in samples])
        raw = kind.collate(size.method, patch_size, raw, SampleOrder(0, size.batch, size.batch))

        def make(name: str, shapes: Any = shapes) -> Tensor:
            return torch.empty(shapes[name], device=META)

        extras = {name: value.to(META, non_blocking=True) for name, value in raw.extras.items()}
        batches.append(Batch(0, micro_step, ModelInput(make, shapes, keep), raw.keys, extras=extras))
    return batches


def watched(ledger: Ledger, method: Method, optimizer: torch.optim.Optimizer) -> trainer_module.Trainer:
    """Return the trainer's own step, its phases told apart."""
    values = StepValues(1e-4, 0.04, own=method.scheduled(0))
    trainer = object.__new__(trainer_module.Trainer)
    trainer.method, trainer.optimizer, trainer.clip_grad_norm, trainer.step = method, optimizer, 3.0, 0
    trainer.schedules = trainer.guard = Parts(values)  # type: ignore[assignment]
    in_phase(ledger, method.teacher, "target_bottlenecks", "teacher")
    in_phase(ledger, dinov3_method, "sinkhorn_targets", "sinkhorn")
    in_phase(ledger, dinov3_method, "_observe", "observations")
    in_phase(ledger, method, "_gram_tokens", "gram teacher")
    in_phase(ledger, method.student.backbone, "forward_crops", "student backbone")
    for name in ("dino_terms", "ibot_term", "mean_koleo", "gram_loss"):
        in_phase(ledger, dinov3_network, name, "heads and losses")
    for head in (method.student.dino_head, method.student.ibot_head):
        in_phase(ledger, head, "forward", "heads and losses")
    in_phase(ledger, trainer_module, "clip_by_module", "clip")
    in_phase(ledger, optimizer, "step", "optimizer")
    in_phase(ledger, method, "after_step", "ema")
    in_phase(ledger, torch.autograd, "backward", "backward heads and losses")

    def reached(gradient: Tensor) -> Tensor:
        ledger.phase = "backward backbone"
        return gradient

    def seen(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(reached)

    method.student.backbone.norm.register_forward_hook(seen)
    return trainer


def trace_step(size: StepSize, checkpointing: bool | str = False, half: bool = True, compiled: bool = True) -> Ledger:
    """Take two steps of the trainer on shapes and return the counts of the second.

    Args:
        size: What a step holds.
        checkpointing: See `MachineConfig.activation_checkpointing`.
        half: In bfloat16.
        compiled: Count what the product compiles as compiled, beside the eager counts.
    """
    ledger = Ledger()
    own = [(module, dict(vars(module))) for module in PATCHED]
    with warnings.catch_warnings(), meta_device(ledger):
        warnings.simplefilter("ignore")
        try:
            with META:
                method = build_method(size, Machine(META, torch.bfloat16 if half else torch.float32))
            if checkpointing:
                for backbone in backbones_in({"": method.model}).values():
                    backbone.recompute_activations(selective=checkpointing == "selective")
            if compiled:
                for part in method.parts():
                    part.forward = as_compiled(ledger, part.forward)
                for module in (sinkhorn, prototype_cross_entropy):
                    for name, value in list(vars(module).items()):
                        if hasattr(value, "runs_compiled"):
                            setattr(module, name, as_compiled(ledger, value))
            modules = method.trainable()
            optimizer = build_optimizer(modules, parameter_rules(modules), fused=True)
            trainer = watched(ledger, method, optimizer)
            for _ in range(2):
                batches = micro_batches(size, method.student.backbone.patch_size)
                gc.collect()
                ledger.start()
                trainer.train_step(batches)
                ledger.phase = "other"
            if ledger.stretch is not None:
                ledger.close()
        finally:
            for module, names in own:
                for name, value in names.items():
                    if vars(module).get(name) is not value:
                        setattr(module, name, value)
    return ledger


def main(argv: Sequence[str] | None = None) -> None:
    """Trace one step and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--gram-size", type=int)
    parser.add_argument("--checkpointing", nargs="?", const=True, default=False, choices=["selective"])
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lines", type=int, default=0, help="also the lines that touch most, and what is alive at the peak")
    given = parser.parse_args(argv)
    given.gram = given.gram_size is not None
    size = step_size(given)
    if given.gram:
        size = with_crops(size, gram_px=given.gram_size)
    size = replace(size, accumulation=given.accumulation)
    ledger = trace_step(size, given.checkpointing)
    sys.stdout.write(json.dumps(figures_of(ledger)) + "\n")
    for (phase, where, name), cost in ledger.lines.most_common(given.lines):
        sys.stdout.write(f"{cost / 1e9:8.1f} GB  {phase} | {where} | {name}\n")
    for label, held in ledger.alive(ledger.peak_at).most_common(given.lines):
        sys.stdout.write(f"{held / 1e9:8.2f} GB alive at the peak ({ledger.peak_at})  {label}\n")
    if given.lines:
        sys.stdout.write(f"waits {dict(ledger.waits)}\ncopies {dict(ledger.copies)}\n")


if __name__ == "__main__":
    main()
