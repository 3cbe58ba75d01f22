"""`meddino-eval probe`: its arguments and what it prints."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from meddino.core.errors import ConfigError
from meddino.core.logging import console
from meddino.data.remote import corpus_location

RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval probe`."""
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        metavar="[NAME=]MODEL",
        help="export, run, weights file or random:<backbone>; may be given several times",
    )
    parser.add_argument("--data", required=True, type=Path, help="labelled data set, 2D or 3D, in any layout `segment` reads")
    parser.add_argument("--out", required=True, type=Path, help="folder for config.yaml, cases.csv and metrics.json")
    parser.add_argument("--corpus", type=corpus_location, help="corpus that the model learned from: its volumes are marked")
    parser.add_argument("--no-random", action="store_true", help="leave out random weights of the first model's architecture")
    parser.add_argument("--config", default="probe", help="YAML file or shipped name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set, e.g. train_slices=8 seeds=[0]")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval probe`."""
    from meddino.core.config import load_config
    from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig
    from meddino_evaluation.segmentation.dense_probe.run import run_probe

    config = load_config(ProbeConfig, [arguments.config], arguments.overrides, kind="evaluation")
    models = _named(arguments.model)
    first = next(iter(models.values()))
    if not arguments.no_random and not first.startswith("random:"):
        models |= {RANDOM: f"random:{first}"}
    metrics = run_probe(config, models, arguments.data, arguments.out, arguments.corpus)
    console.print(_table(metrics))
    console.print(f"every number again from {arguments.out / 'cases.csv'}")


def _named(entries: list[str]) -> dict[str, str]:
    """Return models by name; a model without one is called as its path or name ends.

    Raises:
        ConfigError: Two models have one name.
    """
    models: dict[str, str] = {}
    for entry in entries:
        name, equals, model = entry.partition("=")
        if not equals:
            name, model = Path(entry).name or entry, entry
        if name in models:
            raise ConfigError(f"--model {entry}: the name '{name}' is taken by {models[name]}; write another NAME=MODEL")
        models[name] = model
    return models


def _table(metrics: dict[str, Any]) -> Table:
    labels = list(next(iter(metrics["models"].values()))["chosen"]["by_label"])
    table = Table("features", "macro-F1 (mean ± SD over draws)", "95 % over patients", *labels)
    for name, readouts in metrics["models"].items():
        found = readouts["chosen"]
        f1, (low, high) = found["macro_f1"], found["interval_95"]
        spread = "" if f1["std"] is None else f" ± {f1['std']:.3f}"
        interval = "too few patients" if low is None else f"{low:.3f} to {high:.3f}"
        classes = ["-" if found["by_label"][label] is None else f"{found['by_label'][label]:.2f}" for label in labels]
        table.add_row(name, f"{f1['mean']:.3f}{spread}" if f1["mean"] is not None else "undefined", interval, *classes)
    return table
