"""How far it is: a bar with the time left on a terminal, a line now and then in a log file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meddino.core.logging import console, get_logger
from meddino.distributed.collectives import is_main

LINE_EVERY_S = 20.0
logger = get_logger(__name__)


class StepProgress:
    """Shows the steps of one stage."""

    def __init__(
        self, stage: str, first_step: int, steps: int, images_per_step: int, bar: Progress | None, later_steps: float = 0.0
    ) -> None:
        """Take what is shown.

        Args:
            stage: Its name.
            first_step: Steps done already.
            steps: Of the whole stage.
            images_per_step: Slices.
            bar: On a terminal.
            later_steps: What the later stages cost, in steps of this one.
        """
        self.later_steps = later_steps
        self.stage, self.first_step, self.steps, self.images_per_step = stage, first_step, steps, images_per_step
        self._bar = bar
        self._task = bar.add_task(stage, total=steps, completed=first_step, words="") if bar else None
        self._start = self._last_line = time.monotonic()

    def left_s(self, step: int) -> float:
        """Return how long the rest of the stage will take after a step [s], probes and saves included, as so far."""
        return (time.monotonic() - self._start) / max(1, step - self.first_step) * (self.steps - step)

    def run_left_s(self, step: int) -> float:
        """Return how long the rest of the run will take after a step [s]: the later stages by their arithmetic."""
        left_steps = self.steps - step
        return self.left_s(step) * (left_steps + self.later_steps) / left_steps if left_steps else 0.0

    def advance(self, record: Mapping[str, Any]) -> None:
        """Show one more step; `record` is its line of metrics.jsonl."""
        step, now = record["step"], time.monotonic()
        loss = record["loss"]
        words = f"loss {loss:.3f}" if loss is not None else "skipped"
        words += f"  {self.images_per_step / max(record['timing']['step_s'], 1e-9):.0f} images/s"
        if self._bar is not None and self._task is not None:
            whole = f"  run {_duration(self.run_left_s(step))}" if self.later_steps and step < self.steps else ""
            self._bar.update(self._task, completed=step, words=words + whole)
        elif is_main() and (now - self._last_line >= LINE_EVERY_S or step in (self.first_step + 1, self.steps)):
            left_s = record["timing"]["eta_s"]
            run = f", {_duration(self.run_left_s(step))} of the run" if self.later_steps and step < self.steps else ""
            logger.info("%s step %d/%d  %s  about %s left%s", self.stage, step, self.steps, words, _duration(left_s), run)
            self._last_line = now


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def show_progress(
    stage: str, first_step: int, steps: int, images_per_step: int, later_steps: float = 0.0
) -> Iterator[StepProgress]:
    """Show a stage's progress for as long as the block lasts; see `StepProgress`."""
    if not (is_main() and console.is_terminal):
        yield StepProgress(stage, first_step, steps, images_per_step, None, later_steps)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[words]}"), console=console
    ) as bar:
        yield StepProgress(stage, first_step, steps, images_per_step, bar, later_steps)
