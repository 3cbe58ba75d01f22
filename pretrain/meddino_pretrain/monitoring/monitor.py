"""Looking at a run while it trains: health numbers, pictures, verdicts in the log, and the report that shows them."""

import time
from collections.abc import Mapping
from pathlib import Path

from meddino.core.files import atomic_write
from meddino.core.logging import get_logger
from meddino.distributed.collectives import is_main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.dinov3.network import DINOv3Network
from meddino_pretrain.monitoring.feature_metrics import HealthProbe
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.pictures import health_pictures
from meddino_pretrain.monitoring.report import PICTURES, REFRESH_S, RunReport

FIRST_REPORT_S = 20.0
# Writing the report takes a fiftieth of the time at most: the other processes wait for the one that writes.
REPORT_SHARE = 50
logger = get_logger(__name__)


class Watch:
    """Looks at one stage's teacher on fixed slices, at set steps and at the stage's end, and says how the run is doing."""

    def __init__(
        self,
        run: Path,
        stage: str,
        config: PretrainConfig,
        probe: HealthProbe,
        teacher: DINOv3Network,
        report: RunReport,
        metrics: MetricsWriter | None,
    ) -> None:
        """Take finished parts.

        Args:
            run: The run's folder.
            stage: Name of the stage.
            config: The recipe.
            probe: Measures on fixed slices.
            teacher: What is measured.
            report: Of the run; the first process writes it.
            metrics: Where pictures are shown as well; None in all processes but the first.
        """
        self.run, self.stage, self.config, self.probe, self.teacher = run, stage, config, probe, teacher
        self.steps = config.stages[stage].steps
        self._report, self._metrics = report, metrics
        self._said: set[str] = set()
        self._spent_s = 0.0
        self._next_report = time.monotonic() + FIRST_REPORT_S

    def begin(self, teacher_temperature: float) -> None:
        """Look before the first step: what later looks are compared with, and the first pictures."""
        if self.config.health.every_steps and self.config.stages[self.stage].starts_from is None:
            self.probe.measure(self.teacher, teacher_temperature)
            self._draw(0)

    def numbers(self, step: int, teacher_temperature: float) -> Mapping[str, float]:
        """Return what is to be added to a step's record; empty where no look is due. Every process asks."""
        if not self.config.health.every_steps or not (self.probe.due(step) or step == self.steps):
            return {}
        start = time.perf_counter()
        measured = self.probe.measure(self.teacher, teacher_temperature)
        self._spent_s += time.perf_counter() - start
        return measured

    def take_seconds(self) -> float:
        """Return the time [s] that looks, pictures, rules and the report took since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def after_record(self, step: int, looked: bool) -> None:
        """After a record was written: draw what was looked at, say what is wrong, and rewrite the report if it is time."""
        start = time.perf_counter()
        if looked:
            self._draw(step)
        due = is_main() and time.monotonic() >= self._next_report
        if is_main() and (looked or due):
            self.say_verdicts()
        if due:
            self._write_report(finished=False)
        self._spent_s += time.perf_counter() - start

    def say_verdicts(self) -> None:
        """Put into the log what is to be said of the stage, each only once."""
        for verdict in self._report.verdicts(self.stage):
            if verdict.name not in self._said:
                self._said.add(verdict.name)
                logger.log(30 if verdict.grave else 20, "%s, step %d: %s", self.stage, verdict.step, verdict.words)

    def end(self, finished: bool) -> None:
        """Say and write what there is, where training stops before the stage's end.

        Args:
            finished: True if it will not go on by itself.
        """
        if is_main():
            self.say_verdicts()
            self._write_report(finished)

    def _write_report(self, finished: bool) -> None:
        start = time.monotonic()
        self._report.write(finished)
        now = time.monotonic()
        self._next_report = now + max(REFRESH_S, REPORT_SHARE * (now - start))

    def _draw(self, step: int) -> None:
        pictures = health_pictures(lambda images: self.teacher.look(images, 1_000_000)[0], self.probe.fixed, self.probe.machine)
        if is_main():
            for name, png in pictures.items():
                with atomic_write(self.run / self.stage / PICTURES / f"{name}-{step:09d}.png") as stream:
                    stream.write(png)
        if self._metrics is not None:
            self._metrics.write_pictures(pictures, step)
