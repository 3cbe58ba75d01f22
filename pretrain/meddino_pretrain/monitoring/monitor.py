"""Watching a run while it trains: feature metrics, pictures, findings in the log, and the report that shows them."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from meddino.core.files import atomic_write
from meddino.core.logging import get_logger
from meddino.distributed.collectives import is_main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.base import Method
from meddino_pretrain.monitoring.feature_metrics import FeatureProbe
from meddino_pretrain.monitoring.labelled_probe import LabelledProbe
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.pictures import probe_pictures
from meddino_pretrain.monitoring.report import PICTURES, REFRESH_S, RunReport

FIRST_REPORT_S = 20.0
# Writing the report takes a fiftieth of the time at most: the other processes wait for the one that writes.
REPORT_SHARE = 50
logger = get_logger(__name__)


class Monitor:
    """Probes one stage's features on fixed slices, at set steps and at the stage's end, and says how the run is doing."""

    def __init__(
        self,
        run: Path,
        stage: str,
        config: PretrainConfig,
        probe: FeatureProbe,
        labelled: LabelledProbe,
        method: Method,
        report: RunReport,
        metrics: MetricsWriter | None,
    ) -> None:
        """Take finished parts.

        Args:
            run: The run's folder.
            stage: Name of the stage.
            config: The recipe.
            probe: Measures on fixed slices.
            labelled: Measures on labelled patients, where a recipe names some.
            method: What is measured.
            report: Of the run; the first process writes it.
            metrics: Where pictures are shown as well; None in all processes but the first.
        """
        self.run, self.stage, self.config, self.method = run, stage, config, method
        self.probe, self.labelled = probe, labelled
        self.steps = config.stages[stage].steps
        self._report, self._metrics = report, metrics
        self._logged: set[str] = set()
        self._spent_s = 0.0
        self._next_report = time.monotonic() + FIRST_REPORT_S if config.saving.report else math.inf

    def begin(self) -> None:
        """Probe before the first step: what later probes are compared with, and the first pictures."""
        if self.config.probe.every_steps and self.config.stages[self.stage].starts_from is None:
            self.probe.measure(self.method.probe)
            self._draw(0)

    def measure(self, step: int) -> Mapping[str, float | str]:
        """Return what is to be added to a step's record; empty where no probe is due. Every process asks."""
        if not self.config.probe.every_steps or not (self.probe.due(step) or step == self.steps):
            return {}
        start = time.perf_counter()
        measured = {**self.probe.measure(self.method.probe), **self.labelled.measure(step)}
        self._spent_s += time.perf_counter() - start
        return measured

    def take_seconds(self) -> float:
        """Return the time [s] that probes, pictures, rules and the report took since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def after_record(self, step: int, probed: bool) -> None:
        """After a record was written: draw what was probed, say what is wrong, and rewrite the report if it is time."""
        start = time.perf_counter()
        if probed:
            self._draw(step)
        due = is_main() and time.monotonic() >= self._next_report
        if is_main() and (probed or due):
            self.log_findings()
        if due:
            self._write_report(finished=False)
        self._spent_s += time.perf_counter() - start

    def log_findings(self) -> None:
        """Put into the log what was found in the stage, each finding only once."""
        for finding in self._report.findings(self.stage):
            if finding.name not in self._logged:
                self._logged.add(finding.name)
                logger.log(finding.severity, "%s, step %d: %s", self.stage, finding.step, finding.message)

    def end(self, finished: bool) -> None:
        """Say and write what there is, where training stops before the stage's end.

        Args:
            finished: True if it will not go on by itself.
        """
        if is_main():
            self.log_findings()
            if self.config.saving.report:
                self._write_report(finished)

    def _write_report(self, finished: bool) -> None:
        start = time.monotonic()
        self._report.write(finished)
        now = time.monotonic()
        self._next_report = now + max(REFRESH_S, REPORT_SHARE * (now - start))

    def _draw(self, step: int) -> None:
        pictures = probe_pictures(lambda images: self.method.probe(images).patch_map, self.probe.fixed, self.probe.machine)
        if is_main():
            for name, png in pictures.items():
                with atomic_write(self.run / self.stage / PICTURES / f"{name}-{step:09d}.png") as stream:
                    stream.write(png)
        if self._metrics is not None:
            self._metrics.write_pictures(pictures, step)
