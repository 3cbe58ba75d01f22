"""What the study's pretrainings are worth on other tasks: labels of whole slices, a real tumour, and few labelled patients.

    python -m tests.benchmarks.bench_worth --out DIR                                  # first: the pretrainings
    python -m tests.benchmarks.bench_worth_tasks --out DIR --shared ../shared/data    # goes on where it stands; hours
    python -m tests.benchmarks.bench_worth_tasks --out DIR --shared ../shared/data --only table

Three stages of the demo's recipe and what leaves a loss out, five seeds, each beside random weights of five seeds; every part
is one of the project's commands, in DIR/tasks. The tables go to DIR/tasks/tasks.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from meddino_evaluation.classification.results import read_per_case
from meddino_evaluation.metrics.classification import classification_metric, resampled_metric
from meddino_evaluation.metrics.classification_bootstrap import Runs, paired_metric
from meddino_evaluation.metrics.statistics import Resampling, holm, paired_means
from meddino_evaluation.study.segmentation_runs import read_variant
from numpy.typing import NDArray

from tests.benchmarks.bench_worth import (
    DATASET,
    FIRST,
    RANDOM,
    SEEDS,
    STAGES,
    STEPS,
    Part,
    over_patients_and_seeds,
    over_seeds_too,
    patient_scores,
    run_parts,
)

ARMS = (*(("all", stage) for stage in STAGES), *((arm, FIRST) for arm in ("no_ibot", "no_dino", "no_koleo")))
NAMES = tuple(f"{arm}_{stage.partition('_')[0]}" for arm, stage in ARMS)
LABELLED, LABELLED_ARMS = (1, 2, 4, 8), 4
"""Labelled patients; with how many of them all arms are compared."""
TASKS = (("ct_contrast", "."), ("ct_plane", "classification/ct_plane"))
PROTOCOLS = ("knn", "logistic")
SARCOMA = "segmentation/Dataset901_SarcomaCT"


def checkpoint(out: Path, arm: str, stage: str, seed: int) -> Path:
    """Return the end of a stage of one of the study's runs."""
    return out / "runs" / f"{arm}_s{seed}" / stage / "checkpoints" / f"step-{STEPS[stage]:09d}"


def models(out: Path, seed: int) -> dict[str, str]:
    """Return all weights of a seed, random ones of the same architecture last."""
    trained = {name: str(checkpoint(out, *arm, seed)) for name, arm in zip(NAMES, ARMS, strict=True)}
    return {**trained, RANDOM: f"random:{checkpoint(out, 'all', FIRST, seed)}@{seed}"}


def slice_parts(out: Path, shared: Path, seeds: Sequence[int]) -> Iterator[Part]:
    """Yield the study of labels of whole slices; its settings are written before it."""
    named = [f"{name}_s{seed}={model}" for seed in seeds for name, model in models(out, seed).items()]
    settings = {
        "models": named,
        "data": [{"dataset": name, "root": root} for name, root in TASKS],
        "protocols": PROTOCOLS,
        "evaluation": {"split": {"repeats": 5}},
    }
    file, folder = out / "tasks" / "slices.yaml", out / "tasks" / "slices"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")  # JSON is YAML
    words = ("eval", "study", "compare", "--config", str(file), "--data-root", str(shared), "--out", str(folder))
    yield Part(folder / "results.csv", words)


def sarcoma_parts(out: Path, shared: Path, seeds: Sequence[int]) -> Iterator[Part]:
    """Yield a probe of patches of the tumour for all weights."""
    for seed in seeds:
        for name, model in models(out, seed).items():
            folder = out / "tasks" / "sarcoma" / f"{name}_s{seed}"
            words = ("eval", "probe", "--no-random", "--model", f"probed={model}", "--data", str(shared / SARCOMA))
            yield Part(folder / "metrics.json", (*words, "--out", str(folder)))


def labelled_parts(out: Path, seeds: Sequence[int]) -> Iterator[Part]:
    """Yield the segmentations of phantoms learnt from few patients, drawn anew with each seed; the main ones first."""
    cohort = out / "labelled"
    data = cohort / DATASET
    yield Part(data / "dataset.json", ("curate", "phantom", "--out", str(cohort), "--seed", "3000", "--patients", "80"))
    several = [name for name in NAMES if name != NAMES[0]]
    for seed, count, names in [
        *((seed, count, (NAMES[0], RANDOM)) for seed in seeds for count in LABELLED),
        *((seed, LABELLED_ARMS, several) for seed in seeds),
    ]:
        folder = out / "tasks" / "labelled" / f"n{count}_s{seed}{'-arms' if names is several else ''}"
        settings = ("--config", "few_patients", f"labels.train_cases={count}", f"seeds=[{seed}]")
        given = [word for name in names for word in ("--model", f"{name}={models(out, seed)[name]}")]
        words = ("eval", "compare", *settings, "--data", str(data), "--modes", "frozen", "finetune", *given)
        yield Part(folder / "comparison.json", (*words, "--out", str(folder)))


@dataclass(frozen=True)
class Row:
    """One arm on one task beside random weights.

    Attributes:
        task: With what was measured.
        name: Of the weights.
        each: One value a seed.
        difference: Of the means over seeds from random weights', with intervals over patients, and over patients and seeds.
        p, p_holm: Permutation test over patients; adjusted for all rows of the task.
    """

    task: str
    name: str
    each: tuple[float, ...]
    difference: float = float("nan")
    patients_95: tuple[float, float] = (float("nan"), float("nan"))
    both_95: tuple[float, float] = (float("nan"), float("nan"))
    p: float = float("nan")
    p_holm: float = float("nan")


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """Adjust the p values of a task for all its rows."""
    tested = [row for row in rows if row.name != RANDOM]
    adjusted = dict(zip([row.name for row in tested], holm([row.p for row in tested]), strict=True))
    return [replace(row, p_holm=float(adjusted.get(row.name, np.nan))) for row in rows]


def rows_of_patients(task: str, tables: Mapping[str, NDArray[np.float64]], paired_seeds: bool = False) -> list[Row]:
    """Compare what has one number a patient.

    Args:
        task: For the table.
        tables: Name of the weights to [seeds, patients], the patients in one order.
        paired_seeds: A seed means the same for all weights, the patients that were learnt from: it is drawn for both.
    """
    rows, base = [], tables[RANDOM]
    for name, table in tables.items():
        row = Row(task, name, tuple(table.mean(1)))
        if name != RANDOM:
            found = paired_means(table.mean(0), base.mean(0))
            paired = paired_seeds and len(table) == len(base)  # what is not done yet has fewer
            sides = (table - base, np.zeros_like(base)) if paired else (table, base)
            both = over_patients_and_seeds(*sides)
            row = replace(row, difference=found.difference, patients_95=(found.low, found.high), both_95=both, p=found.p_value)
        rows.append(row)
    return with_holm(rows)


def rows_of_auroc(task: str, runs: Mapping[str, Sequence[Runs]]) -> list[Row]:
    """Compare AUROC, the mean of five random splits and of seeds.

    Args:
        task: For the table.
        runs: Name of the weights to each seed's runs; all of the same cases in the same order.
    """
    first = runs[RANDOM][0]
    patients = [patient for groups, _, _ in first for patient in groups]
    drawing = Resampling(len(patients), patients)
    weights, kind = drawing.weights(), "multiclass" if first[0][2].shape[1] > 2 else "binary"
    values, drawn = {}, {}
    for name, seeds in runs.items():
        values[name] = np.array([np.mean([classification_metric("auroc", kind, *one[1:]) for one in each]) for each in seeds])
        drawn[name] = np.stack([_drawn(kind, each, weights) for each in seeds])
    rows = []
    for name, seeds in runs.items():
        row = Row(task, name, tuple(values[name]))
        if name != RANDOM:
            both = min(len(seeds), len(runs[RANDOM]))  # what is not done yet has fewer
            sides = ([one for each in side[:both] for one in each] for side in (seeds, runs[RANDOM]))
            found = paired_metric(kind, *sides, "auroc")
            difference = float(values[name].mean() - values[RANDOM].mean())
            too = over_seeds_too(drawing, difference, drawn[name], drawn[RANDOM])
            row = replace(row, difference=difference, patients_95=(found.low, found.high), both_95=too, p=found.p_value)
        rows.append(row)
    return with_holm(rows)


def _drawn(kind: str, runs: Runs, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return [resamples]: the mean over runs of AUROC where it is defined."""
    ends = np.cumsum([0, *(len(groups) for groups, _, _ in runs)])
    each = [
        resampled_metric("auroc", kind, truth, probabilities, weights[:, start:end])
        for (_, truth, probabilities), start, end in zip(runs, ends[:-1], ends[1:], strict=True)
    ]
    return np.nanmean(np.stack(each), axis=0)


def read_slices(folder: Path, dataset: str, protocol: str) -> dict[str, list[Runs]]:
    """Read the study of whole slices: name of the weights to each seed's runs."""
    found: dict[str, dict[int, Runs]] = {}
    for file in sorted((folder / "jobs").glob(f"*-{dataset}-{protocol}-*/metrics.json")):
        data = json.loads(file.read_text(encoding="utf-8"))["data"]
        runs = read_per_case(file.with_name("per_case.csv"), data["classes"], data["task"])
        name, _, seed = file.parent.name.partition(f"-{dataset}-")[0].rpartition("_s")
        found.setdefault(name, {})[int(seed)] = [(run.patients, run.truth, run.probabilities) for run in runs]
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in found.items()}


def read_labelled(folder: Path, count: int, mode: str) -> dict[str, NDArray[np.float64]]:
    """Read segmentations: name of the weights to mean Dice [seeds, patients]."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for metrics in sorted(folder.glob(f"n{count}_s*/runs/*_{mode}-*/metrics.json")):
        name = metrics.parent.name.rpartition(f"_{mode}-")[0]
        seed = int(metrics.parents[2].name.partition("_s")[2].removesuffix("-arms"))
        found.setdefault(name, {})[seed] = read_variant(name, metrics.parent).by_case("dice")
    return _tables(found)


def read_sarcoma(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Read probes: name of the weights to each patient's own F1 of the tumour [seeds, patients]."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for file in sorted(folder.glob("*/metrics.json")):
        name, _, seed = file.parent.name.rpartition("_s")
        found.setdefault(name, {})[int(seed)] = patient_scores(file.parent, "probed")
    return _tables(found)


def _tables(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, NDArray[np.float64]]:
    """Return each weights' scores by seed and patient as [seeds, patients], both in order."""
    return {
        name: np.array([[seeds[seed][patient] for patient in sorted(seeds[seed])] for seed in sorted(seeds)])
        for name, seeds in found.items()
    }


def all_rows(out: Path) -> Iterator[list[Row]]:
    """Yield the rows of each task that has results beside random weights."""
    folder = out / "tasks"
    for dataset, protocol in ((dataset, protocol) for dataset, _ in TASKS for protocol in PROTOCOLS):
        runs = read_slices(folder / "slices", dataset, protocol)
        if RANDOM in runs:
            yield rows_of_auroc(f"{dataset}, {protocol}, AUROC", runs)
    tables = {"sarcoma, patches of the tumour, F1": read_sarcoma(folder / "sarcoma")}
    for count, mode in ((count, mode) for count in LABELLED for mode in ("frozen", "finetune")):
        tables[f"{count} labelled phantoms, {mode}, Dice"] = read_labelled(folder / "labelled", count, mode)
    yield from (rows_of_patients(task, table, "labelled" in task) for task, table in tables.items() if RANDOM in table)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table of a task."""
    lines = [
        f"| {rows[0].task} | each seed | mean | above random (95 % over patients; over patients and seeds) | p, Holm |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ends = [f"{low:+.3f} to {high:+.3f}" for low, high in (row.patients_95, row.both_95)]
        above = f"{row.difference:+.3f} ({ends[0]}; {ends[1]})".replace("+nan to +nan", "-")
        own = f"| {row.name} | {', '.join(f'{value:.3f}' for value in row.each)} | {np.mean(row.each):.3f} "
        p = "-" if np.isnan(row.p_holm) else f"{row.p_holm:.4f}"
        lines.append(own + ("| | |" if row.name == RANDOM else f"| {above} | {p} |"))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done, and print the tables."""
    doc = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_worth_tasks", description=doc)
    parser.add_argument("--out", required=True, type=Path, help="folder of bench_worth")
    parser.add_argument("--shared", required=True, type=Path, help="folder of the real data")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=("table",), help="nothing is run")
    given = parser.parse_args(argv)
    if given.only is None:
        run_parts(list(slice_parts(given.out, given.shared, given.seeds)))
        run_parts(list(sarcoma_parts(given.out, given.shared, given.seeds)))
        run_parts(list(labelled_parts(given.out, given.seeds)))
    tables = "\n".join(as_markdown(rows) for rows in all_rows(given.out))
    (given.out / "tasks" / "tasks.md").write_text(tables, encoding="utf-8")
    sys.stdout.write(tables)


if __name__ == "__main__":
    main()
