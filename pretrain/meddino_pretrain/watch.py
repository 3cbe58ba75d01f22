"""Looking at a run while it trains: health numbers, pictures, verdicts in the log, and the report that shows them."""

from collections.abc import Mapping
from pathlib import Path

from meddino.core.files import atomic_write
from meddino.core.logging import get_logger
from meddino.distributed.collectives import is_main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.diagnosis import verdicts
from meddino_pretrain.health import HealthProbe
from meddino_pretrain.health_pictures import health_pictures
from meddino_pretrain.metrics import read_metrics
from meddino_pretrain.objectives.dinov3_network import DINOv3Network
from meddino_pretrain.report import write_report

PICTURES = "pictures"
logger = get_logger(__name__)


class Watch:
    """Looks at one stage's teacher on fixed slices, at set steps and at the stage's end."""

    def __init__(self, run: Path, stage: str, config: PretrainConfig, probe: HealthProbe, teacher: DINOv3Network) -> None:
        """Take finished parts.

        Args:
            run: The run's folder.
            stage: Name of the stage.
            config: The recipe.
            probe: Measures on fixed slices.
            teacher: What is measured.
        """
        self.run, self.stage, self.config, self.probe, self.teacher = run, stage, config, probe, teacher
        self.steps = config.stages[stage].steps
        self._said: set[str] = set()

    def begin(self, teacher_temperature: float) -> None:
        """Look before the first step: what later looks are compared with, and the first pictures."""
        if self.config.health.every_steps and self.config.stages[self.stage].starts_from is None:
            self.probe.measure(self.teacher, teacher_temperature)
            self._draw(0)

    def numbers(self, step: int, teacher_temperature: float) -> Mapping[str, float]:
        """Return what is to be added to a step's record; empty where no look is due. Every process asks."""
        if not self.config.health.every_steps or not (self.probe.due(step) or step == self.steps):
            return {}
        return self.probe.measure(self.teacher, teacher_temperature)

    def after_record(self, step: int, looked: bool) -> None:
        """Say what is wrong and rewrite the report, after a record with a look in it was written."""
        if not looked:
            return
        self._draw(step)
        if not is_main():
            return
        records = read_metrics(self.run / self.stage / "metrics.jsonl")
        found = verdicts(
            records,
            self.config.diagnosis,
            prototypes=self.config.heads.dino.prototypes,
            from_released_weights=self.config.init.weights != "scratch",
        )
        for verdict in found:
            if verdict.name not in self._said:
                self._said.add(verdict.name)
                logger.log(30 if verdict.grave else 20, "%s, step %d: %s", self.stage, step, verdict.words)
        write_report(self.run, self.config, finished=False)

    def _draw(self, step: int) -> None:
        pictures = health_pictures(lambda images: self.teacher.look(images, 1_000_000)[0], self.probe.fixed, self.probe.machine)
        if is_main():
            for name, png in pictures.items():
                with atomic_write(self.run / self.stage / PICTURES / f"{name}-{step:09d}.png") as stream:
                    stream.write(png)
