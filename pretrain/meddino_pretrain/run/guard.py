"""What guards a run: signals, corrupt samples, and steps whose loss or gradient is not finite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddino.core.errors import MedDINOError, StoppedEarly
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.corrupt_samples import CorruptSamples
from meddino_pretrain.run.signals import StopRequest


@dataclass(frozen=True)
class Ending:
    """Why a stage ends before its last step.

    Attributes:
        error: What is raised.
        save: Whether the state is worth a checkpoint.
        will_go_on: Whether the same command goes on by itself.
    """

    error: MedDINOError | StoppedEarly
    save: bool
    will_go_on: bool


class RunGuard:
    """Says after each step whether a stage may go on. Its count of skipped steps is part of the training state.

    Attributes:
        corrupt: The corrupt samples that the run has met.
        skipped_in_a_row: Skipped steps up to now, so that a resumed run counts on.
    """

    def __init__(self, stop: StopRequest, corrupt: CorruptSamples, max_bad_steps: int) -> None:
        """Take what it watches.

        Args:
            stop: Whether a signal came to this process; the trainer tells all.
            corrupt: The corrupt samples that the run has met.
            max_bad_steps: Skipped steps in a row after which the run stops.
        """
        self.stop, self.corrupt, self.max_bad_steps = stop, corrupt, max_bad_steps
        self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])

    def after_step(
        self, record: Mapping[str, Any], batches: Sequence[Batch], stop: bool, step: int, steps: int
    ) -> Ending | None:
        """Return why the stage ends after a step, or None. Every process asks after every step, and all get the same answer.

        Args:
            record: The step's record.
            batches: Its micro-batches.
            stop: Whether a signal had come to any process.
            step: Steps done.
            steps: Length of the stage.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0
        if self.skipped_in_a_row >= self.max_bad_steps:
            return Ending(self._diverged(step, record["keys"]), save=False, will_go_on=False)
        if record["corrupt_samples"]:  # of all processes, so that all come here or none
            self.corrupt.add([each for batch in batches for each in batch.corrupt])
        if (error := self.corrupt.error()) is not None:
            return Ending(error, save=True, will_go_on=False)
        if stop and step < steps:
            message = f"stopped by a signal after step {step}, all is saved; run the same command again"
            return Ending(StoppedEarly(message), save=True, will_go_on=True)
        return None

    def _diverged(self, step: int, keys: Sequence[str]) -> MedDINOError:
        return MedDINOError(
            f"{self.skipped_in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite "
            f"(optimizer.max_bad_steps = {self.max_bad_steps}); last samples: {', '.join(keys[:8])}. "
            "The weights are those before the first of them; report.html shows how it came. Look at the samples. If this "
            "was bf16, machine.precision=fp32 may be given to it; a lower schedule.lr needs a new one (another --out), and "
            "init.weights takes a checkpoint of this one"
        )
