"""The training loop. `build.py` makes its parts, `stages.py` runs one trainer a stage."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meddino.core.device import Machine
from meddino.core.errors import MedDINOError, StoppedEarly
from meddino.core.logging import get_logger
from meddino.core.precision import at_least_float32
from meddino.distributed.collectives import all_gather_strings, all_reduce_mean, world_size
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.base import Objective
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.monitor import Watch
from meddino_pretrain.monitoring.progress import StepProgress
from meddino_pretrain.monitoring.speed import SpeedMeter
from meddino_pretrain.optimizer import clip_by_module, set_rates
from meddino_pretrain.run.checkpoints import StageCheckpoints
from meddino_pretrain.run.signals import StopRequest
from meddino_pretrain.schedules import Schedules

logger = get_logger(__name__)


class Trainer:
    """Trains one stage from the step its checkpoints stand at to its end."""

    def __init__(
        self,
        *,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        steps: Iterable[Sequence[Batch]],
        checkpoints: StageCheckpoints,
        metrics: MetricsWriter | None,
        progress: StepProgress,
        watch: Watch,
        speed: SpeedMeter,
        stop: StopRequest,
        machine: Machine,
        clip_grad_norm: float,
        max_bad_steps: int,
    ) -> None:
        """Take finished parts.

        Args:
            objective: Networks and losses.
            optimizer: Over the objective's trained modules.
            schedules: Values by step.
            steps: The micro-batches of each step, from the first step still to be done.
            checkpoints: Knows the step stood at; saves.
            metrics: Where records go; None in all processes but the first.
            progress: What people see.
            watch: Looks at the teacher now and then.
            speed: Counts operations.
            stop: Whether a signal came.
            machine: Where it runs.
            clip_grad_norm: Largest gradient norm of a module.
            max_bad_steps: Skipped steps in a row after which the run stops.
        """
        self.objective, self.optimizer, self.schedules, self.steps = objective, optimizer, schedules, steps
        self.checkpoints, self.metrics, self.progress, self.watch, self.stop = checkpoints, metrics, progress, watch, stop
        self.speed, self.machine, self.clip_grad_norm, self.max_bad_steps = speed, machine, clip_grad_norm, max_bad_steps
        self.step, self.damaged = checkpoints.step, checkpoints.damaged

    def fit(self) -> None:
        """Train to the stage's end.

        Raises:
            StoppedEarly: A signal came; the state is saved.
            MedDINOError: Too many bad steps in a row, or too many damaged slices; the latter with the state saved.
        """
        for batches in self.steps:
            start = time.perf_counter()
            record = self.train_step(batches)
            self.step += 1
            self.write_down(record, batches, time.perf_counter() - start)
            self.stop_if_diverged(record)
            if record["damaged_slices"]:  # of all processes, so that all come here or none
                self.damaged.add([each for batch in batches for each in batch.damaged])
            stop = self.stop.agreed()
            self.checkpoints.after_step(self.step, self.metrics, now=stop or self.damaged.too_many)
            if self.damaged.too_many:
                self.checkpoints.finish()
                self.watch.end(finished=True)
                self.damaged.check()
            if stop and self.step < self.schedules.steps:
                self.checkpoints.finish()
                self.watch.end(finished=False)
                raise StoppedEarly(f"stopped by a signal after step {self.step}, all is saved; run the same command again")
        self.checkpoints.finish()

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Take one optimizer step and return what is to be known of it.

        A loss or gradient that is not finite changes nothing: neither weights nor moments nor the teacher.
        """
        values = self.schedules.at(self.step)
        set_rates(
            self.optimizer, values.lr, values.weight_decay, values.last_layer_lr_multiplier, values.backbone_lr_multiplier
        )
        self.optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        for losses in self.objective.losses(batches, values, self.step):
            torch.autograd.backward(losses["total"] / len(batches))
            for name, value in losses.items():
                summed[name] = summed.get(name, 0.0) + value.detach() / len(batches)
        norms = clip_by_module(self.objective.trained, self.clip_grad_norm)
        numbers = self._numbers(summed, norms, batches)
        skipped = not all(torch.isfinite(torch.tensor(list(numbers.values()))))
        if not skipped:
            self.optimizer.step()
            self.objective.after_step(values)
        self.checkpoints.bad_in_a_row = self.checkpoints.bad_in_a_row + 1 if skipped else 0
        return {
            "loss": numbers.pop("total"),
            **numbers,
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "teacher_temperature": values.teacher_temperature,
            "damaged_slices": round(numbers["damaged_slices"]),
            "skipped": skipped,
        }

    def write_down(self, record: dict[str, Any], batches: Sequence[Batch], step_s: float) -> None:
        """Complete a step's record and write it; a skipped step names its samples."""
        if record["skipped"]:
            keys = all_gather_strings([key for batch in batches for key in batch.keys])
            record["keys"] = keys
            logger.warning("step %d skipped: loss or gradient not finite (samples %s)", self.step, ", ".join(keys))
        looked = self.watch.numbers(self.step, record["teacher_temperature"])
        wait_s = sum(batch.data_wait_s for batch in batches)
        timing = {
            "step_s": step_s + wait_s,
            "data_wait_s": wait_s,
            "images_per_s": self.progress.images_per_step / (step_s + wait_s),
            "peak_memory_mib": self.machine.peak_memory_mib(),
            **self.speed.figures(batches, step_s + wait_s),
            "look_s": self.watch.take_seconds(),
            "eta_s": self.progress.left_s(self.step),
        }
        full = {"step": self.step, **record, **looked, "timing": timing}
        if self.metrics is not None:
            self.metrics.write(full)
        self.progress.advance(full)
        self.watch.after_record(self.step, bool(looked))

    def stop_if_diverged(self, record: Mapping[str, Any]) -> None:
        """Raise after too many skipped steps in a row."""
        count = self.checkpoints.bad_in_a_row
        if count >= self.max_bad_steps:
            self.watch.end(finished=True)
            raise MedDINOError(
                f"{count} steps in a row up to step {self.step} had a loss or gradient that is not finite "
                f"(optimizer.max_bad_steps = {self.max_bad_steps}); last samples: {', '.join(record['keys'][:8])}. "
                "The weights are those before the first of them; report.html shows how it came. Look at the samples. If this "
                "was bf16, machine.precision=fp32 may be given to it; a lower schedule.lr needs a new one (another --out), and "
                "init.weights takes a checkpoint of this one"
            )

    def _numbers(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """Bring losses (averaged over processes), gradient norms, observations and counts to the host in one copy."""
        observed = self.objective.observations()
        # Times the processes, for what follows is a mean.
        damaged = losses["total"].new_tensor(float(world_size() * sum(len(batch.damaged) for batch in batches)))
        norms = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        named = {**losses, **norms, **observed, "damaged_slices": damaged}
        flat = all_reduce_mean(torch.stack([at_least_float32(value).reshape(()) for value in named.values()]))
        return dict(zip(named, flat.tolist(), strict=True))
