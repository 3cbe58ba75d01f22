"""run/report.html: how the training goes, in words and pictures."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.files import write_text
from meddino.core.html import Section, figure, join, page, table, text
from meddino.core.html_charts import chart, in_columns
from meddino.data.intensity import MEMBERS
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.config import Chart, Terms
from meddino_pretrain.monitoring.diagnostics import Finding, findings
from meddino_pretrain.monitoring.feature_metrics import MEANINGS, PREFIX
from meddino_pretrain.monitoring.history import History, has_probe
from meddino_pretrain.monitoring.labelled_probe import DATA

REFRESH_S = 30
PICTURES = "pictures"
SCHEDULES = (
    Chart("learning rate", "lr", {"lr": "lr"}),
    Chart("weight decay", "weight_decay", {"weight_decay": "weight_decay"}),
)
FEATURES = (
    Chart(
        "effective rank on fixed slices (RankMe)", "rank", {"features/cls_rankme": "CLS", "features/patch_rankme": "patches"}
    ),
    Chart("distance of a CLS token to its nearest", "distance", {"features/nearest_distance": "distance"}),
    Chart(
        "change of similarities since the first probe",
        "root mean square",
        {"features/cls_drift": "between slices", "features/patch_drift": "between patches"},
    ),
    Chart("nearest slices that are those of the first probe", "share", {"features/neighbours_kept": "share"}),
    Chart("patch consistency", "consistency", {"features/patch_consistency": "consistency"}),
    Chart(
        "organs read from patch tokens of labelled patients (chooses nothing)",
        "macro-F1",
        {"labelled/macro_f1": "exported backbone", "labelled/macro_f1_pixels": "pixels alone"},
    ),
)
Records = Sequence[Mapping[str, Any]]


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

    def findings(self, stage: str) -> list[Finding]:
        """Return what was found in a stage by now."""
        history = self._histories[stage]
        history.update()
        return findings(
            history.records,
            self.config.diagnosis,
            terms=self.config.stages[stage].method.terms,
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

    def _stage(self, name: str, start: dict[str, Any]) -> Markup:
        found, history = self.findings(name), self._histories[name]
        pictures = sorted((self.run / name / PICTURES).glob("*.png"))
        state = (history.count, len(pictures), json.dumps(start, sort_keys=True))
        # A stage that is over is drawn once.
        if name not in self._drawn or self._drawn[name][0] != state:
            terms = self.config.stages[name].method.terms
            parts = (_draw(start, found, history, terms), *_pictures(pictures, _shown_range(self.config)))
            self._drawn[name] = (state, join(*parts))
        return self._drawn[name][1]


def _draw(start: dict[str, Any], found: Sequence[Finding], history: History, terms: Terms) -> Markup:
    records = history.records
    parts = [text(f"Starts from {start['message']}.")]
    if choice := start.get("choice"):
        parts += _choice(choice)
    if not records:
        return join(*parts, text("No step was taken in this stage.", "note"))
    parts += [
        text(f"{finding.name.replace('_', ' ')}: {finding.message}.", "warning" if finding.severity >= WARNING else "note")
        for finding in found
    ]
    if corrupt := round(history.totals["corrupt_samples"]):
        parts.append(text(f"Corrupt samples were met {corrupt} times, and others taken for them; the log names them.", "note"))
    parts.append(_speed(records, history, int(start["steps"])))
    good = [record for record in records if record["loss"] is not None]
    if good:
        rows = [(term, good[0][term], good[-1][term]) for term in ("loss", *terms.losses) if term in good[0]]
        ends = table(("term", f"step {good[0]['step']}", f"step {good[-1]['step']}"), rows)
        parts += [ends, in_columns(stage_charts(good, terms)), *_other_data(good), _features(records)]
        if history.every > 1:
            parts.append(text(f"Curves show every {history.every}th step, all probes, and the newest steps."))
    return join(*parts)


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
            "probes [s]",
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
                None if left_s is None else _clock(left_s),
                totals["step_s"],
                totals["eval_time_s"],
                median("step_s"),
                median("images_per_s"),
                100 * totals["data_wait_s"] / max(totals["step_s"], 1e-9),
                median("tflops"),
                median("share_of_peak"),
                history.peak_memory_mib,
            )
        ],
        dash="not known yet",
    )


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"


def _choice(choice: dict[str, Any]) -> list[Markup]:
    steps = sorted(int(step) for step in choice["curve"])
    curve = {"patch consistency": ([float(step) for step in steps], [choice["curve"][str(step)] for step in steps])}
    marks = {"chosen": float(choice["step"])}
    return [
        text(f"Kept backbone: {choice['message']}."),
        in_columns([chart(curve, "patch quality of the kept backbones", "step", "consistency", marks=marks)]),
    ]


def _features(records: Records) -> Markup:
    probed = [record for record in records if has_probe(record)]
    if not probed:
        return Markup("")
    first, last = probed[0], probed[-1]
    rows = [
        (name, first.get(f"{PREFIX}{name}"), last.get(f"{PREFIX}{name}"), meaning)
        for name, meaning in MEANINGS.items()
        if f"{PREFIX}{name}" in last
    ]
    header = ("features of fixed slices", f"step {first['step']}", f"step {last['step']}", "what it means")
    return table(header, rows, dash="not measured at that step")


def _other_data(records: Records) -> list[Markup]:
    """Say from which steps on the labelled curve is of other data, which no number in it shows."""
    probed = [record for record in records if DATA in record]
    changed = [now for before, now in itertools.pairwise(probed) if now[DATA] != before[DATA]]
    return [
        text(
            f"The labelled data is another from step {record['step']} on ({record[DATA][:12]}): macro-F1 before it and after "
            "it does not compare.",
            "warning",
        )
        for record in changed
    ]


def _shown_range(config: PretrainConfig) -> str:
    """Return which stored values are black and white in pictures of slices, by modality."""
    return ", ".join(MEMBERS[contract.modality].shown for contract in config.contracts)


def _pictures(files: Sequence[Path], shown_range: str) -> list[Markup]:
    slices = f"slices ({shown_range})"
    kinds = (
        ("pca", f"{slices} and their patch tokens as colours: the first three principal components over the body"),
        ("similarity", f"{slices} and the cosine similarity of every patch to the red one: black 0 and below, white 1"),
    )
    parts = []
    for name, words in kinds:
        of_kind = [file for file in files if file.stem.startswith(f"{name}-")]
        for file in dict.fromkeys([*of_kind[:1], *of_kind[-1:]]):
            step = int(file.stem.rsplit("-", 1)[1])
            parts.append(figure(file.read_bytes(), f"After step {step}, exported backbone: {words}"))
    return parts


def stage_charts(records: Records, terms: Terms) -> list[Markup]:
    """Draw what was measured in a stage; see `meddino.core.html_charts.chart`.

    Args:
        records: One a step, maybe thinned, in order.
        terms: What the method records.
    """
    present = {name for record in records for name in record}
    losses = [name for name in ("loss", *terms.losses) if name in present]
    norms = {name: name.removeprefix("grad_norm/") for name in sorted(present) if name.startswith("grad_norm/")}
    charts = [
        # A chart each: on one axis the fall of every term is lost in the differences between them.
        *(chart(_series(records, {name: name}), name, "step", name) for name in losses),
        chart(_series(records, norms), "gradient norm before clipping", "step", "L2 norm", log_y=True),
    ]
    charts += [
        chart(_series(records, each.series), each.title, "step", each.unit, levels=each.levels or None)
        for each in (*terms.charts, *SCHEDULES, *FEATURES)
    ]
    return [made for made in charts if made]


def _series(records: Records, names: Mapping[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return step and value of each number wherever it was measured."""
    series = {}
    for name, words in names.items():
        found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if found:
            series[words] = ([step for step, _ in found], [value for _, value in found])
    return series
