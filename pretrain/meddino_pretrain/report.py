"""run/report.html: how the training went, in words and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.files import write_text
from meddino.core.html import Section, figure, join, line_chart, page, table, text
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.diagnosis import verdicts
from meddino_pretrain.health import MEANINGS
from meddino_pretrain.metrics import read_metrics

TERMS = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram", "leash")
REFRESH_S = 30
Records = Sequence[dict[str, Any]]


def write_report(run: Path, config: PretrainConfig, finished: bool = True) -> Path:
    """Write the report of a run from what lies in its folder and return its path.

    Args:
        run: The run's folder.
        config: Its recipe.
        finished: False lets the page reload itself.
    """
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    sections = []
    for name in config.stages:
        records = read_metrics(run / name / "metrics.jsonl")
        origin = info["stages"].get(name)
        if origin is not None:
            sections.append(Section(name, _stage(run / name, config, origin, records)))
    page_text = page(
        "Pretraining",
        f"{config.backbone.name} on corpus {str(info['corpus_hash'])[:12]}, seed {config.seed}",
        sections,
        footer=f"Written by meddino-pretrain into {run.name}/report.html",
        refresh_s=0 if finished else REFRESH_S,
    )
    path = run / "report.html"
    write_text(path, page_text)
    return path


def _stage(folder: Path, config: PretrainConfig, origin: dict[str, Any], records: Records) -> Markup:
    good = [record for record in records if record["loss"] is not None]
    parts = [text(f"Starts from {origin['words']}.")]
    if choice := origin.get("gram_choice"):
        parts += _gram_choice(choice)
    if not records:
        return join(*parts, text("No step was taken in this stage.", "note"))
    parts += [
        text(f"{verdict.name.replace('_', ' ')}: {verdict.words}.", "warning" if verdict.grave else "note")
        for verdict in verdicts(
            records,
            config.diagnosis,
            prototypes=config.heads.dino.prototypes,
            from_released_weights=config.init.weights != "scratch",
        )
    ]
    if damaged := sum(record.get("damaged_slices", 0) for record in records):
        parts.append(
            text(f"Damaged slices were met {damaged} times, and others stood in for them; the log names them.", "note")
        )
    if good:
        present = [term for term in TERMS if term in good[0]]
        parts.append(table(("term", "first step", "last step"), [(term, good[0][term], good[-1][term]) for term in present]))
        parts.append(_speed(records))
        parts += _curves(good, present)
    parts += _health(records)
    parts += _pictures(folder)
    return join(*parts)


def _curves(good: Records, present: list[str]) -> list[Markup]:
    def series(*names: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            name: ([r["step"] for r in good if r.get(name) is not None], [r[name] for r in good if r.get(name) is not None])
            for name in names
        }

    norms = [name for name in good[0] if name.startswith("grad_norm/")]
    return [
        figure(line_chart(series(*present), "loss terms", "step", "loss")),
        figure(line_chart(series("lr"), "learning rate", "step", "lr")),
        figure(line_chart(series(*norms), "gradient norm before clipping", "step", "L2 norm", log_y=True)),
        figure(line_chart(series("teacher_entropy"), "entropy of the targets", "step", "nats")),
    ]


def _speed(records: Records) -> Markup:
    timings = [record["timing"] for record in records]
    total_s = sum(timing["step_s"] for timing in timings)
    wait_s = sum(timing["data_wait_s"] for timing in timings)
    # The first step also starts readers and kernels.
    steady = sorted(timing["step_s"] for timing in timings[1:] or timings)
    rates = [timing["images_per_s"] for timing in timings]
    return table(
        (
            "steps",
            "time [s]",
            "median step [s]",
            "slices/s (best)",
            "waiting for data [%]",
            "TFLOP/s (best)",
            "share of peak",
            "memory [MiB]",
        ),
        [
            (
                len(records),
                total_s,
                steady[len(steady) // 2],
                max(rates),
                100 * wait_s / max(total_s, 1e-9),
                max(timing["tflops"] for timing in timings),
                max(timing["share_of_peak"] for timing in timings),
                max(timing["peak_memory_mib"] for timing in timings),
            )
        ],
    )


def _gram_choice(choice: dict[str, Any]) -> list[Markup]:
    steps = sorted(int(step) for step in choice["curve"])
    curve = {"patch consistency": ([float(step) for step in steps], [choice["curve"][str(step)] for step in steps])}
    marks = {"chosen": float(choice["step"])}
    return [
        text(f"Gram teacher: {choice['words']}."),
        figure(line_chart(curve, "patch quality of the kept teachers", "step", "consistency", marks=marks)),
    ]


def _health(records: Records) -> list[Markup]:
    looked = [record for record in records if any(name.startswith("health/") for name in record)]
    if not looked:
        return []
    first, last = looked[0], looked[-1]
    rows = [
        (name, first.get(f"health/{name}"), last.get(f"health/{name}"), meaning)
        for name, meaning in MEANINGS.items()
        if f"health/{name}" in last
    ]
    return [table(("teacher on fixed slices", f"step {first['step']}", f"step {last['step']}", "what it means"), rows)]


def _pictures(folder: Path) -> list[Markup]:
    parts = []
    for name, words in (("pca", "patch tokens as colours (PCA)"), ("similarity", "cosine similarity to the marked patch")):
        files = sorted((folder / "pictures").glob(f"{name}-*.png"))
        for file in dict.fromkeys([*files[:1], *files[-1:]]):
            step = int(file.stem.rsplit("-", 1)[1])
            parts.append(figure(file.read_bytes(), f"{words}, teacher after step {step}"))
    return parts
