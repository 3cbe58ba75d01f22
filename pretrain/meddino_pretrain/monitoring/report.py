"""run/report.html: how the training goes, in words and pictures."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.files import write_text
from meddino.core.html import Section, figure, join, line_chart, page, table, text
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.diagnostics import Verdict, verdicts
from meddino_pretrain.monitoring.feature_metrics import MEANINGS
from meddino_pretrain.monitoring.history import History, has_look
from meddino_pretrain.monitoring.report_curves import TERMS, stage_charts

REFRESH_S = 30
PICTURES = "pictures"
CHART_PX = 500  # two beside one another
Records = Sequence[dict[str, Any]]


class RunReport:
    """The report of a run, written again and again while it goes on: only what is new is read and drawn."""

    def __init__(self, run: Path, config: PretrainConfig) -> None:
        """Take what it is about.

        Args:
            run: The run's folder.
            config: Its recipe.
        """
        self.run, self.config = run, config
        newest = config.diagnosis.window_steps
        self._histories = {name: History(run / name / "metrics.jsonl", newest) for name in config.stages}
        self._drawn: dict[str, tuple[object, Markup]] = {}

    def verdicts(self, stage: str) -> list[Verdict]:
        """Return what is to be said of a stage by now."""
        history = self._histories[stage]
        history.read_on()
        return verdicts(
            history.records,
            self.config.diagnosis,
            prototypes=self.config.heads.dino.prototypes,
            from_released_weights=self.config.init.weights != "scratch",
            max_bad_steps=self.config.optimizer.max_bad_steps,
        )

    def write(self, finished: bool) -> Path:
        """Write report.html from what lies in the run's folder and return its path.

        Args:
            finished: False lets the page reload itself.
        """
        info = json.loads((self.run / "run.json").read_text(encoding="utf-8"))
        sections = [
            Section(name, self._stage(name, info["stages"][name])) for name in self.config.stages if name in info["stages"]
        ]
        page_text = page(
            "Pretraining",
            f"{self.config.backbone.name} on corpus {str(info['corpus_hash'])[:12]}, seed {self.config.seed}",
            sections,
            footer=f"Written by meddino-pretrain into {self.run.name}/report.html",
            refresh_s=0 if finished else REFRESH_S,
        )
        path = self.run / "report.html"
        write_text(path, page_text)
        return path

    def _stage(self, name: str, origin: dict[str, Any]) -> Markup:
        found, history = self.verdicts(name), self._histories[name]
        pictures = sorted((self.run / name / PICTURES).glob("*.png"))
        state = (history.count, len(pictures), json.dumps(origin, sort_keys=True))
        # A stage that is over is drawn once.
        if name not in self._drawn or self._drawn[name][0] != state:
            self._drawn[name] = (state, self._draw(origin, found, history, pictures))
        return self._drawn[name][1]

    def _draw(self, origin: dict[str, Any], found: Sequence[Verdict], history: History, pictures: Sequence[Path]) -> Markup:
        records = history.records
        parts = [text(f"Starts from {origin['words']}.")]
        if choice := origin.get("gram_choice"):
            parts += _gram_choice(choice)
        if not records:
            return join(*parts, text("No step was taken in this stage.", "note"))
        parts += [
            text(f"{verdict.name.replace('_', ' ')}: {verdict.words}.", "warning" if verdict.grave else "note")
            for verdict in found
        ]
        if damaged := round(history.totals["damaged_slices"]):
            words = f"Damaged slices were met {damaged} times, and others stood in for them; the log names them."
            parts.append(text(words, "note"))
        parts.append(_speed(records, history, int(origin["steps"])))
        good = [record for record in records if record["loss"] is not None]
        if good:
            present = [term for term in TERMS if term in good[0]]
            rows = [(term, good[0][term], good[-1][term]) for term in present]
            parts.append(table(("term", f"step {good[0]['step']}", f"step {good[-1]['step']}"), rows))
            parts += [figure(chart, width_px=CHART_PX) for chart in stage_charts(good, self.config.heads.dino.prototypes)]
            if history.every > 1:
                parts.append(text(f"Curves show every {history.every}th step, all looks, and the newest steps."))
        return join(*parts, *_health(records), *_pictures(pictures))


def _speed(records: Records, history: History, steps: int) -> Markup:
    timings = [record["timing"] for record in records]
    # The first step also starts readers and kernels.
    steady = timings[1:] or timings

    def median(name: str) -> float:
        return statistics.median(float(timing[name]) for timing in steady)

    totals = history.totals
    step, left_s = int(records[-1]["step"]), timings[-1].get("eta_s")
    return table(
        (
            "step",
            "of",
            "time left",
            "steps [s]",
            "looks [s]",
            "median step [s]",
            "median slices/s",
            "waiting for data [%]",
            "median TFLOP/s",
            "median share of peak",
            "memory [MiB]",
        ),
        [
            (
                step,
                steps,
                "-" if left_s is None else _clock(left_s),
                totals["step_s"],
                totals["look_s"],
                median("step_s"),
                median("images_per_s"),
                100 * totals["data_wait_s"] / max(totals["step_s"], 1e-9),
                median("tflops"),
                median("share_of_peak"),
                history.peak_memory_mib,
            )
        ],
    )


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"


def _gram_choice(choice: dict[str, Any]) -> list[Markup]:
    steps = sorted(int(step) for step in choice["curve"])
    curve = {"patch consistency": ([float(step) for step in steps], [choice["curve"][str(step)] for step in steps])}
    marks = {"chosen": float(choice["step"])}
    return [
        text(f"Gram teacher: {choice['words']}."),
        figure(line_chart(curve, "patch quality of the kept teachers", "step", "consistency", marks=marks)),
    ]


def _health(records: Records) -> list[Markup]:
    looked = [record for record in records if has_look(record)]
    if not looked:
        return []
    first, last = looked[0], looked[-1]
    rows = [
        (name, first.get(f"health/{name}"), last.get(f"health/{name}"), meaning)
        for name, meaning in MEANINGS.items()
        if f"health/{name}" in last
    ]
    return [table(("teacher on fixed slices", f"step {first['step']}", f"step {last['step']}", "what it means"), rows)]


def _pictures(files: Sequence[Path]) -> list[Markup]:
    parts = []
    for name, words in (("pca", "patch tokens as colours (PCA)"), ("similarity", "cosine similarity to the marked patch")):
        of_kind = [file for file in files if file.stem.startswith(f"{name}-")]
        for file in dict.fromkeys([*of_kind[:1], *of_kind[-1:]]):
            step = int(file.stem.rsplit("-", 1)[1])
            parts.append(figure(file.read_bytes(), f"{words}, teacher after step {step}"))
    return parts
