"""What the demo's pretraining is worth, as a study: arms x seeds, each probed on 24 phantom patients never learnt from.

    python -m tests.benchmarks.bench_worth --out DIR                        # goes on where it stands; hours on one core
    python -m tests.benchmarks.bench_worth --out DIR --arms all no_ibot --seeds 0 1
    python -m tests.benchmarks.bench_worth --out DIR --only list            # what is done; `--only table`: the table of it

Every part is one of the project's commands, and is done when its last file is there; nothing is deleted. A run that was begun
elsewhere with the same recipe may be put into DIR/runs. Numbers go to DIR/worth.json, tables to DIR/worth.md: everything beside
random weights, and each arm beside the whole recipe.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from meddino_evaluation.metrics.statistics import Resampling, bootstrap_mean, holm, mean_and_std, paired_means
from numpy.typing import NDArray

STEPS = {"stage1_pretrain": 400, "stage2_gram": 15, "stage3_highres": 10}
"""Of the demo's recipe."""
STAGES = tuple(STEPS)
FIRST = STAGES[0]
LOSSES, HEADS, TEACHER = (f"stages.{FIRST}.method.{part}" for part in ("losses", "heads", "teacher"))
ARMS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no_ibot": (f"{LOSSES}.ibot_weight=0",),
    "no_dino": (f"{LOSSES}.dino_weight=0",),
    "no_koleo": (f"{LOSSES}.koleo_weight=0",),
    "layerscale": ("backbone.changes.layerscale_init=1e-5",),
    "prototypes": (f"{HEADS}.dino.prototypes=2048", f"{HEADS}.ibot.prototypes=2048"),
    "unit_length": (f"{HEADS}.dino.unit_prototypes=false", f"{HEADS}.ibot.unit_prototypes=false"),
    "temperature": (f"{TEACHER}.temperature=0.07",),
    "koleo": (f"{LOSSES}.koleo_weight=0.1",),
    "decay": ("optimizer.layerwise_decay=0.9", "optimizer.patch_embed_lr_multiplier=0.2"),
    "ema": (f"{TEACHER}.ema_momentum=0.98", f"{TEACHER}.ema_momentum_end=0.995"),
}
"""Arm -> what differs from the demo's recipe; `all` runs every stage, the others the first."""
SEEDS = (0, 1, 2, 3, 4)
RANDOM, PIXELS = "random", "pixels"
WHOLE = f"all, {FIRST}"
DATASET = "segmentation/Dataset900_Phantom"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        done: File or folder that is there once it is done.
        words: The command, without `meddino-` before its first word.
    """

    done: Path
    words: tuple[str, ...]


def data_parts(out: Path) -> list[Part]:
    """Return the commands that make the corpus and the patients that are probed."""
    learnt, held = out / "learnt", out / "held"
    exclude = ("--exclude", str(learnt / DATASET))
    corpus = ("curate", "build", str(learnt / "ct"), "--out", str(out / "corpus"), "--config", "demo", *exclude)
    return [
        Part(learnt / DATASET / "dataset.json", ("curate", "phantom", "--out", str(learnt), "--seed", "0")),
        Part(held / DATASET / "dataset.json", ("curate", "phantom", "--out", str(held), "--seed", "1000", "--patients", "48")),
        Part(out / "corpus" / "corpus.json", corpus),
    ]


def swap_parts(dataset: Path) -> None:
    """Let the 24 patients of a cohort's training part be the test part, and its 6 test patients the training part; once."""
    if (dataset / "swapped").exists():
        return
    for kind in ("images", "labels"):
        train, test = (len(list((dataset / f"{kind}{part}").iterdir())) for part in ("Tr", "Ts"))
        if train > test:  # not yet, or cut off between the two
            (dataset / f"{kind}Tr").rename(dataset / f"{kind}_")
            (dataset / f"{kind}Ts").rename(dataset / f"{kind}Tr")
            (dataset / f"{kind}_").rename(dataset / f"{kind}Ts")
    (dataset / "swapped").touch()


def training_parts(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Part]:
    """Yield the pretrainings: first stages of all seeds first, the later stages of `all` after them, then the other arms."""
    for arm, stage in [("all", stage) for stage in STAGES] + [(arm, FIRST) for arm in ARMS if arm != "all"]:
        for seed in seeds if arm in arms else ():
            run, steps = out / "runs" / f"{arm}_s{seed}", STEPS[stage]
            words = ("pretrain", "demo", "--corpus", str(out / "corpus"), "--out", str(run), "--stage", stage, f"seed={seed}")
            yield Part(run / stage / "checkpoints" / f"step-{steps:09d}", (*words, *ARMS[arm]))


def probe_parts(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Part]:
    """Yield the probes of what is trained, and of random weights with each seed."""
    of_training = {part.done: part.done.parents[2].name for part in training_parts(out, arms, seeds)}
    models = {f"{run}-{done.parents[1].name}": (str(done), ()) for done, run in of_training.items() if done.exists()}
    same = next((part.done for part in training_parts(out, ["all"], seeds) if part.done.exists()), None)
    for seed in seeds if same is not None else ():
        models[f"{RANDOM}_s{seed}-{RANDOM}"] = (f"random:{same}", (f"random_seed={seed}",))
    for name, (model, settings) in models.items():
        folder = out / "probes" / name
        words = ("eval", "probe", "--no-random", "--model", f"probed={model}", "--data", str(out / "held" / DATASET))
        yield Part(folder / "metrics.json", (*words, "--out", str(folder), *settings))


def run_parts(parts: Sequence[Part]) -> None:
    """Run what is not done, with one thread; a command that fails ends the study, and the same study goes on."""
    for part in parts:
        if not part.done.exists():
            program = Path(sys.executable).with_name(f"meddino-{part.words[0]}")
            subprocess.run([str(program), *part.words[1:]], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def patient_scores(folder: Path, model: str) -> dict[str, float]:
    """Return each patient's own macro-F1 over organs that are there, of the readout validation chose; a mean over draws."""
    counts: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    with (folder / "cases.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if (row["model"], row["readout"]) == (model, "chosen"):
                numbers = np.array([int(row[key]) for key in ("tp", "fp", "fn")], dtype=np.float64)
                counts.setdefault((row["patient"], row["seed"]), []).append(numbers)
    scores: dict[str, list[float]] = {}
    for (patient, _), each in counts.items():
        tp, fp, fn = np.stack(each).T
        there = 2 * tp + fp + fn > 0
        scores.setdefault(patient, []).append(float((2 * tp[there] / (2 * tp + fp + fn)[there]).mean()))
    return {patient: float(np.mean(values)) for patient, values in scores.items()}


@dataclass(frozen=True)
class Row:
    """One arm after one stage.

    Attributes:
        name: Of the arm and the stage.
        seeds: Of pretraining.
        pooled: Macro-F1 over the patches of all patients, mean over seeds; `by_seed` each.
        mean: Each patient's own macro-F1, mean over patients and seeds; with its standard deviation over seeds.
        patients_95: Interval over patients of `mean`.
        difference: From the baseline, with intervals over patients, and over patients and seeds (also of the baseline).
        p, p_holm: Sign-flip permutation test over patients of the means over seeds; adjusted for all rows.
    """

    name: str
    seeds: tuple[int, ...]
    pooled: float
    by_seed: tuple[float, ...]
    mean: float
    std_over_seeds: float
    patients_95: tuple[float, float]
    difference: float = float("nan")
    difference_95: tuple[float, float] = (float("nan"), float("nan"))
    both_95: tuple[float, float] = (float("nan"), float("nan"))
    p: float = float("nan")
    p_holm: float = float("nan")


def read_rows(out: Path, baseline: str = RANDOM) -> list[Row]:
    """Read all probes that are done.

    Args:
        out: Folder of the study.
        baseline: What each row is compared with: random weights, or `WHOLE`, then only arms that ran the first stage alone.
    """
    found: dict[str, dict[int, Path]] = {}
    for file in sorted((out / "probes").glob("*/metrics.json")):
        run, _, stage = file.parent.name.partition("-")
        arm, _, seed = run.rpartition("_s")
        found.setdefault(arm if stage == arm else f"{arm}, {stage}", {})[int(seed)] = file.parent
    if baseline not in found:
        return []
    tables = {name: _table(folders, "probed") for name, folders in found.items()}
    own = [name for name in found if baseline == RANDOM or name.endswith(FIRST)]
    rows = [_row(name, found[name], tables[name], tables[baseline], baseline) for name in own]
    if baseline == RANDOM:
        pixels = dict([next(iter(found[RANDOM].items()))])
        rows.append(_row(PIXELS, pixels, _table(pixels, PIXELS), tables[RANDOM], RANDOM))
    adjusted = holm([row.p for row in rows])
    rows = [Row(**{**vars(row), "p_holm": float(p)}) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(rows, key=lambda row: row.pooled)


def _table(folders: dict[int, Path], model: str) -> NDArray[np.float64]:
    """Return [seeds, patients]."""
    scores = [patient_scores(folder, model) for _, folder in sorted(folders.items())]
    return np.array([[each[patient] for patient in sorted(scores[0])] for each in scores])


def _row(
    name: str, folders: dict[int, Path], table: NDArray[np.float64], compared_with: NDArray[np.float64], baseline: str
) -> Row:
    model = PIXELS if name == PIXELS else "probed"
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for _, folder in sorted(folders.items())]
    by_seed = tuple(float(each["models"][model]["chosen"]["macro_f1"]["mean"]) for each in metrics)
    over = bootstrap_mean(table.mean(0))
    start = Row(
        name,
        tuple(sorted(folders)),
        float(np.mean(by_seed)),
        by_seed,
        float(table.mean()),
        mean_and_std(table.mean(1))[1],
        (over.low, over.high),
    )
    if name == baseline:
        return start
    result = paired_means(table.mean(0), compared_with.mean(0))
    compared = {"difference": result.difference, "difference_95": (result.low, result.high), "p": result.p_value}
    return Row(**{**vars(start), **compared, "both_95": over_patients_and_seeds(table, compared_with)})


def over_patients_and_seeds(table: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of a difference where patients and the seeds of both are all drawn anew.

    With two or three seeds it is too narrow, as any bootstrap of so few; NaN with one.

    Args:
        table: [seeds, patients].
        other: [other seeds, the same patients].
    """
    patients = Resampling(table.shape[1])
    drawn = [np.stack([patients.means(row) for row in each]) for each in (table, other)]
    return over_seeds_too(patients, float(table.mean() - other.mean()), drawn[0], drawn[1])


def over_seeds_too(
    patients: Resampling, difference: float, drawn: NDArray[np.float64], other: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the interval of a difference of means over seeds, from each seed's value in the same resamples of patients.

    Args:
        patients: The resamples.
        difference: Between the two means.
        drawn: [seeds, resamples].
        other: [other seeds, resamples].
    """
    if min(len(drawn), len(other)) < 2:
        return float("nan"), float("nan")
    weights = [Resampling(len(each), seed=number).weights() / len(each) for number, each in enumerate((drawn, other), start=1)]
    means = [np.einsum("rs,sr->r", weight, each) for weight, each in zip(weights, (drawn, other), strict=True)]
    found = patients.interval(difference, means[0] - means[1])
    return found.low, found.high


def as_markdown(rows: Sequence[Row], baseline: str = RANDOM) -> str:
    """Return the table."""
    lines = [
        "| weights | seeds | macro-F1, pooled | each seed | mean of patients ± SD over seeds (95 % over patients) "
        f"| above {baseline} (95 % over patients; over patients and seeds) | p, Holm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = f"{row.mean:.3f} ± {row.std_over_seeds:.3f} ({row.patients_95[0]:.3f} to {row.patients_95[1]:.3f})"
        ends = [f"{low:+.3f} to {high:+.3f}" for low, high in (row.difference_95, row.both_95)]
        above = "" if row.name == baseline else f"{row.difference:+.3f} ({ends[0]}; {ends[1]})".replace("+nan to +nan", "-")
        each = ", ".join(f"{value:.3f}" for value in row.by_seed)
        p = "" if row.name == baseline else f"{row.p_holm:.4f}"
        lines.append(
            f"| {row.name} | {len(row.seeds)} | {row.pooled:.3f} | {each} | {own.replace('± nan', '')} | {above} | {p} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study as far as it is not done, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_worth", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command again goes on there")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=("list", "probes", "table"), help="list or probe what there is; or only the table")
    given = parser.parse_args(argv)
    data, training = data_parts(given.out), list(training_parts(given.out, given.arms, given.seeds))
    if given.only == "list":
        for part in [*data, *training, *probe_parts(given.out, given.arms, given.seeds)]:
            sys.stdout.write(f"{'done' if part.done.exists() else 'to do'}  {part.done.relative_to(given.out)}\n")
        return
    if given.only != "table":
        run_parts(data)
        swap_parts(given.out / "held" / DATASET)
    for part in [] if given.only else training:
        run_parts([part])
        run_parts(list(probe_parts(given.out, given.arms, given.seeds)))  # so that there is a table from the first hour on
    if given.only == "probes":
        run_parts(list(probe_parts(given.out, given.arms, given.seeds)))
    rows = {baseline: read_rows(given.out, baseline) for baseline in (RANDOM, WHOLE)}
    tables = "\n".join(as_markdown(each, baseline) for baseline, each in rows.items() if each)
    as_values = {baseline: [asdict(row) for row in each] for baseline, each in rows.items()}
    (given.out / "worth.json").write_text(json.dumps(as_values, indent=1), encoding="utf-8")
    (given.out / "worth.md").write_text(tables, encoding="utf-8")
    sys.stdout.write(tables)


if __name__ == "__main__":
    main()
