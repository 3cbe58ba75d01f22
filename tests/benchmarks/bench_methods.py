"""What methods learn in equal processor time from one corpus: kNN and linear probe of frozen features, a JSON line each.

    python -m tests.benchmarks.bench_methods CORPUS --data ../shared/data/classification --seconds 120 --seeds 3 --out FILE

All have one backbone (vitnano8), 48 and 24 px, batches of 32, their recipes' rates. Time is the process's own, so that other
work on the machine does not count. `random` are the weights they all start from. Nothing here reads labels in training;
the pictures of both tasks may be in the corpus. The same command again does what is missing in FILE and prints its table: means
over seeds, and differences from random weights of the same seeds with 95 % intervals over seeds and groups of pictures.

    python -m tests.benchmarks.bench_methods CORPUS --data ... --methods --runs NAME=RUN NAME=RUN --px 96 --out FILE

measures finished runs of `meddino-pretrain` instead, each beside random weights of its own architecture and seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
from meddino_evaluation.classification.images import read_slices
from meddino_pretrain.build import build_loader, build_method, build_stage_optimizer, spread_method, steps_of
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.base import Method
from meddino_pretrain.optimizer import clip_by_module, set_rates
from meddino_pretrain.schedules import Schedules
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

import meddino
from meddino.core.config import load_config
from meddino.core.device import Machine, find_machine
from meddino.data.joined_corpus import open_corpora

PX, SMALL_PX, BATCH = 48, 24, 32
DRAWS = 2000
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMMON = [
    "backbone={name: vitnano8, changes: {layerscale_init: 1.0}}",
    "init.weights=scratch",
    "loader.workers=0",
    "corpus.sampling.repeat_crop=null",
    "optimizer.layerwise_decay=1.0",
    "optimizer.patch_embed_lr_multiplier=1.0",
]
_CROPS = "method.crops={large_px: 48, small_px: 24}"
_HEAD = "{prototypes: 2048, hidden_dim: 1024, bottleneck_dim: 256}"
_JOINT = (_CROPS, "schedule.lr=0.001", "method.hidden_dim=512", "method.out_dim=128")
# Recipe, and what differs in its first stage.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "graph_matching": ("lvm_med_small", (_CROPS,)),
    "lejepa": ("lvm_med_r50_lejepa", _JOINT),
    "simclr": ("lvm_med_r50_simclr", _JOINT),
    "vicreg": ("lvm_med_r50_vicreg", _JOINT),
    "mae": ("lvm_med_vitb_mae", ("schedule.lr=0.001", "method.crop_px=48", "method.decoder={dim: 64, depth: 2, heads: 4}")),
    "dinov3": (
        "demo",
        (
            "method.crops={sizes: [{global_px: 48, local_px: 24}], num_local: 6}",
            "schedule.lr=0.0005",
            f"method.heads={{dino: {_HEAD}, ibot: {_HEAD}}}",
            "method.freeze_last_layer_steps=90",
        ),
    ),
}
SWITCHES = {
    "no_second_order": "method.affinity.edge_weight=0",
    "no_message_passing": "method.graph.message_layers=0",
    "no_noise": "method.matching.noise_scale=0",
    "no_local": "method.affinity.alpha=1",
    "messages_as_printed": "method.graph.message_scale=null",
}


def recipe_of(name: str, seed: int) -> PretrainConfig:
    """Return a method's recipe at the size of this comparison; of graph matching also with one switch off."""
    recipe, changes = METHODS.get(name) or METHODS["graph_matching"]
    changes = (*changes, *([SWITCHES[name]] if name in SWITCHES else []), f"global_batch={BATCH}")
    stage = "stage1_pretrain" if recipe == "demo" else "pretrain"
    given = [*COMMON, *(f"stages.{stage}.{change}" for change in changes), f"seed={seed}"]
    if recipe == "demo":
        given += [
            "backbone.changes.drop_path=0.1",
            "input_contract={modality: image}",
            "other_contracts=[{modality: ct}, {modality: mr}]",
        ]
    return load_config(PretrainConfig, [recipe], given, "pretrain")


def train(config: PretrainConfig, corpus: Path, seconds: float, machine: Machine) -> tuple[Method, dict[str, Any]]:
    """Train for some seconds of processor time; the schedules end there."""
    name, stage = next(iter(config.stages.items()))
    slices = open_corpora([corpus])

    def begin(steps: int) -> tuple[Method, Iterator[tuple[float, dict[str, float]]]]:
        own = stage.model_copy(
            update={"steps": steps, "schedule": stage.schedule.model_copy(update={"warmup_steps": steps // 10})}
        )
        method = build_method(config, own, config.seed, machine)
        spread_method(method, config.machine, machine)
        return method, _steps(config, own, method, slices, machine)

    _, trial = begin(4)
    costs = [cost for cost, _ in trial]
    method, steps = begin(max(10, round(seconds / np.median(costs[1:]))))
    spent, records = 0.0, []
    for cost, record in steps:
        spent += cost
        records.append(record)
        if spent > seconds:
            break
    first, last = ({key: np.mean([each[key] for each in part]) for key in records[0]} for part in (records[:10], records[-10:]))
    return method, {"stage": name, "steps": len(records), "cpu_s": spent, "first_10": first, "last_10": last}


def _steps(config: Any, stage: Any, method: Method, corpus: Any, machine: Machine) -> Iterator[tuple[float, dict[str, float]]]:
    optimizer, schedules = build_stage_optimizer(config.optimizer, method), Schedules(stage.schedule, stage.steps)
    loader = build_loader(config, stage, config.seed, corpus, method.export().patch_size, False, 0, lambda: False)
    start = time.process_time()
    for step, batches in enumerate(steps_of(loader, machine)):
        values = schedules.at(step, method.scheduled(step), method.lr_multipliers(step))
        set_rates(optimizer, values)
        optimizer.zero_grad(set_to_none=True)
        record: dict[str, float] = {}
        for losses in method.losses(batches, values, step):
            losses["total"].backward()  # type: ignore[no-untyped-call]
            record = {key: float(value.detach()) for key, value in losses.items()}
        clip_by_module(method.trainable(), config.optimizer.clip_grad_norm)
        optimizer.step()
        method.after_step(values)
        now = time.process_time()
        yield now - start, record
        start = now


class Tokens(Protocol):
    """What a method's probe and a model's tokens have in common."""

    @property
    def cls_token(self) -> torch.Tensor: ...

    @property
    def patch_map(self) -> torch.Tensor | None: ...


class Task:
    """The pictures of a data set, and who belongs together."""

    def __init__(self, name: str, root: Path, px: int = PX) -> None:
        dataset = open_dataset(load_dataset_config(name), root / name)
        self.name = name
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))
        images = []
        for case in dataset.cases:
            stack = read_slices(case.source, "image")
            image = stack.tensor(0, 1)
            image = image.expand(1, 3, *image.shape[-2:])
            image = torch.nn.functional.interpolate(image, (px, px), mode="bicubic", antialias=True, align_corners=False)
            images.append((image[0].clamp(0, 1) - mean) / deviation)
        self.images = torch.stack(images)
        self.labels = np.array([case.label for case in dataset.cases]).reshape(-1)
        self.groups = np.unique([case.patient for case in dataset.cases], return_inverse=True)[1].reshape(-1)

    def features(self, probe: Callable[[torch.Tensor], Tokens]) -> NDArray[np.float32]:
        """Return the CLS token and the mean of the patch tokens of each picture."""
        found = []
        with torch.inference_mode():
            for part in self.images.split(64):
                seen = probe(part)
                assert seen.patch_map is not None
                found.append(torch.cat([seen.cls_token, seen.patch_map.mean((2, 3))], dim=1))
        return torch.cat(found).numpy()

    def predictions(self, features: NDArray[np.float32]) -> dict[str, list[int]]:
        """Return what kNN and a linear probe say of each picture, over five folds of groups."""
        models = {
            "knn": make_pipeline(Normalizer(), KNeighborsClassifier(10, weights="distance")),
            "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)),
        }
        results = {}
        for name, model in models.items():
            predicted = np.empty_like(self.labels)
            for train_rows, test_rows in GroupKFold(5).split(features, self.labels, self.groups):
                predicted[test_rows] = model.fit(features[train_rows], self.labels[train_rows]).predict(features[test_rows])
            results[name] = predicted.tolist()
        return results

    def balanced_accuracy(self, predicted: list[int], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return balanced accuracy where groups count so many times each; `counts` is [draws, groups]."""
        weights, right = counts[:, self.groups], np.asarray(predicted) == self.labels
        classes = [self.labels == label for label in np.unique(self.labels)]
        recalls = [weights[:, each & right].sum(axis=1) / weights[:, each].sum(axis=1) for each in classes]
        return np.mean(recalls, axis=0)


def measure_run(name: str, run: Path, tasks: list[Task], done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Yield random weights of a finished run's architecture and seed, and what it has learnt; not what is done."""
    config = load_config(PretrainConfig, [str(run / "config.yaml")], [], "pretrain")
    steps_of_stages = [
        len(file.read_text().splitlines()) for stage in config.stages if (file := run / stage / "metrics.jsonl").exists()
    ]
    for method, source in ((f"random {name}", f"random:{run}"), (name, str(run))):
        if (method, config.seed) in done:
            continue
        backbone = meddino.load(source, seed=config.seed).backbone
        predicted = {task.name: task.predictions(task.features(backbone.tokens)) for task in tasks}
        steps = 0 if source.startswith("random:") else sum(steps_of_stages)
        yield {"method": method, "beside": f"random {name}", "seed": config.seed, "steps": steps, "predicted": predicted}


def table(rows: list[dict[str, Any]], tasks: list[Task]) -> str:
    """Return a Markdown table of the finished runs beside random weights of the same seeds."""
    rng, found = np.random.default_rng(0), {(row["method"], row["seed"]): row for row in rows}
    draws = {task.name: rng.multinomial(count := task.groups.max() + 1, [1 / count] * count, DRAWS) for task in tasks}
    measures = [(task, measure) for task in tasks for measure in ("knn", "linear")]
    lines = [" | ".join(["| weights | seeds | steps", *(f"{task.name} {measure}" for task, measure in measures)]) + " |"]
    lines.append("|---" * (3 + len(measures)) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        beside = next(row.get("beside", "random") for row in rows if row["method"] == method)
        seeds = [seed for name, seed in found if name == method and (beside, seed) in found]
        again = rng.integers(0, len(seeds), (DRAWS, len(seeds)))
        steps = sorted(found[method, seed].get("steps", 0) for seed in seeds)
        cells = [method, str(len(seeds)), f"{steps[0]} to {steps[-1]}" if steps[-1] else "0"]
        for task, measure in measures:
            counts = np.concatenate([np.ones((1, draws[task.name].shape[1])), draws[task.name]])
            own, base = (
                np.stack([task.balanced_accuracy(found[name, seed]["predicted"][task.name][measure], counts) for seed in seeds])
                for name in (method, beside)
            )
            cell = f"{own[:, 0].mean():.3f}"
            if method != beside:
                gain = (own - base)[:, 1:]
                low, high = np.percentile(gain[again.T, np.arange(DRAWS)].mean(axis=0), [2.5, 97.5])
                cell += f", {(own - base)[:, 0].mean():+.3f} ({low:+.3f} to {high:+.3f})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return what is done; a line that was cut off is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    """Train and measure, one seed after the other, so that what is there is always comparable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=RUN")
    parser.add_argument("--px", type=int, default=PX, help="side of the pictures that are measured")
    parser.add_argument("--methods", nargs="*", default=["random", *METHODS], choices=["random", *METHODS, *SWITCHES])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = find_machine("cpu")
    tasks = [Task(name, arguments.data, arguments.px) for name in ("brain_mri", "pneumoniamnist")]
    done = {(row["method"], row["seed"]) for row in read_rows(arguments.out)}
    for seed, name in product(range(arguments.seeds), arguments.methods):
        if (name, seed) in done:
            continue
        config = recipe_of(name, seed)
        if name == "random":
            method, told = build_method(config, next(iter(config.stages.values())), seed, machine), {}
        else:
            method, told = train(config, arguments.corpus, arguments.seconds, machine)
        predicted = {task.name: task.predictions(task.features(method.probe)) for task in tasks}
        with arguments.out.open("a") as file:
            file.write(json.dumps({"method": name, "seed": seed, **told, "predicted": predicted}) + "\n")
    for word in arguments.runs:
        name, _, run = word.partition("=")
        for row in measure_run(name, Path(run), tasks, done):
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    sys.stdout.write(f"{table(read_rows(arguments.out), tasks)}\n")


if __name__ == "__main__":
    main()
