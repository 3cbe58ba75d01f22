"""The training loop. `build.py` makes its parts, `stages.py` runs one trainer a stage."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meddino.core.device import Machine, at_least_float32
from meddino.core.logging import get_logger
from meddino.distributed.collectives import all_gather_strings, all_reduce_mean, world_size
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.workers import WorkersLost
from meddino_pretrain.methods.base import Method
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.monitor import Monitor
from meddino_pretrain.monitoring.progress import StepProgress
from meddino_pretrain.monitoring.speed import SpeedMeter
from meddino_pretrain.optimizer import clip_by_module, set_rates
from meddino_pretrain.run.checkpoints import StageCheckpoints
from meddino_pretrain.run.guard import RunGuard
from meddino_pretrain.schedules import Schedules

logger = get_logger(__name__)


class Trainer:
    """Trains one stage from the step its checkpoints stand at to its end."""

    def __init__(
        self,
        *,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        steps: Iterable[Sequence[Batch]],
        checkpoints: StageCheckpoints,
        guard: RunGuard,
        metrics: MetricsWriter | None,
        progress: StepProgress,
        monitor: Monitor,
        speed: SpeedMeter,
        machine: Machine,
        clip_grad_norm: float,
    ) -> None:
        """Take finished parts.

        Args:
            method: Networks and losses.
            optimizer: Over the method's trained modules.
            schedules: Values by step.
            steps: The micro-batches of each step, from the first step still to be done.
            checkpoints: Knows the step stood at; saves.
            guard: Ends the stage where it must not go on.
            metrics: Where records go; None in all processes but the first.
            progress: What people see.
            monitor: Probes the features now and then.
            speed: Counts operations.
            machine: Where it runs.
            clip_grad_norm: Largest gradient norm of a module.
        """
        self.method, self.optimizer, self.schedules, self.steps = method, optimizer, schedules, steps
        self.checkpoints, self.guard, self.metrics, self.progress = checkpoints, guard, metrics, progress
        self.monitor, self.speed, self.machine, self.clip_grad_norm = monitor, speed, machine, clip_grad_norm
        self.step = checkpoints.step

    def fit(self) -> None:
        """Train to the stage's end.

        Raises:
            StoppedEarly: A signal came, or no batch comes any more; the state is saved.
            MedDINOError: Too many skipped steps in a row, or too many corrupt samples; the latter with the state saved.
        """
        try:
            self._take_steps()
        except WorkersLost:
            # All steps so far are whole. Of several processes the others may be in the midst of one: nobody saves then.
            if world_size() == 1:
                self.checkpoints.after_step(self.step, self.metrics, now=True)
                self.checkpoints.finish()
            raise
        self.checkpoints.finish()

    def _take_steps(self) -> None:
        for batches in self.steps:
            start = time.perf_counter()
            record = self.train_step(batches)
            stop = record.pop("stop_asked")
            self.step += 1
            self.log_step(record, batches, time.perf_counter() - start)
            ending = self.guard.after_step(record, batches, stop, self.step, self.schedules.steps)
            if ending is None or ending.save:
                self.checkpoints.after_step(self.step, self.metrics, now=ending is not None)
            if ending is not None:
                self.checkpoints.finish()
                self.monitor.end(finished=not ending.will_go_on)
                raise ending.error

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Take one optimizer step and return what is to be known of it.

        A loss or gradient that is not finite changes nothing: neither weights nor moments nor the teacher.
        """
        values = self.schedules.at(self.step, self.method.scheduled(self.step), self.method.lr_multipliers(self.step))
        set_rates(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        for losses in self.method.losses(batches, values, self.step):
            torch.autograd.backward(losses["total"] / len(batches))
            for name, value in losses.items():
                summed[name] = summed.get(name, 0.0) + value.detach() / len(batches)
        norms = clip_by_module(self.method.trainable(), self.clip_grad_norm)
        numbers = self._numbers(summed, norms, batches)
        skipped = not all(torch.isfinite(torch.tensor(list(numbers.values()))))
        if not skipped:
            self.optimizer.step()
            self.method.after_step(values)
        return {
            "loss": numbers.pop("total"),
            **numbers,
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            **values.own,
            "corrupt_samples": round(numbers["corrupt_samples"]),
            "stop_asked": numbers["stop_asked"] > 0,
            "skipped": skipped,
        }

    def log_step(self, record: dict[str, Any], batches: Sequence[Batch], step_s: float) -> None:
        """Complete a step's record and write it; a skipped step names its samples."""
        if record["skipped"]:
            keys = all_gather_strings([key for batch in batches for key in batch.keys])
            record["keys"] = keys
            logger.warning("step %d skipped: loss or gradient not finite (samples %s)", self.step, ", ".join(keys))
        measured = self.monitor.measure(self.step)
        wait_s = sum(batch.data_wait_s for batch in batches)
        timing = {
            "step_s": step_s + wait_s,
            "data_wait_s": wait_s,
            "images_per_s": self.progress.images_per_step / (step_s + wait_s),
            "peak_memory_mib": self.machine.peak_memory_mib(),
            **self.speed.figures(batches, step_s + wait_s),
            "eval_time_s": self.monitor.take_seconds(),
            "eta_s": self.progress.left_s(self.step),
        }
        full = {"step": self.step, **record, **measured, "timing": timing}
        if self.metrics is not None:
            self.metrics.write(full)
        self.progress.advance(full)
        self.monitor.after_record(self.step, bool(measured))

    def _numbers(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """Bring losses (averaged over processes), gradient norms, observations and counts to the host in one copy.

        All that processes have to agree on after a step is among the numbers: they need no other message.
        """
        observed = self.method.observations()
        # Times the processes, for what follows is a mean.
        counts = {"corrupt_samples": sum(len(batch.corrupt) for batch in batches), "stop_asked": self.guard.stop.came()}
        noted = {name: losses["total"].new_full((), float(world_size() * count)) for name, count in counts.items()}
        norms = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        named = {**losses, **norms, **observed, **noted}
        flat = all_reduce_mean(torch.stack([at_least_float32(value).reshape(()) for value in named.values()]))
        return dict(zip(named, flat.tolist(), strict=True))
