"""`meddino-eval segment`: its arguments and what it prints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.data.remote import corpus_location

CONFIG_HELP = "YAML file or shipped name: minutes, evening (one GPU, or a night of a CPU), paper; by the machine if not given"
logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval segment`."""
    parser.add_argument("--model", required=True, help="export, run, weights file, random:<backbone> or random:<export folder>")
    parser.add_argument("--data", required=True, type=Path, help="data set in nnU-Net's raw layout, or a folder of pictures")
    add_task_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; the same command again goes on there")
    parser.add_argument(
        "--corpus", type=corpus_location, help="corpus or URL that the model learned from: its volumes are marked"
    )
    add_test_argument(parser)
    parser.add_argument("--config", help=CONFIG_HELP)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys to set, e.g. seeds=[0,1,2] head.name=linear"
    )


def default_config() -> str:
    """Return the recipe that fits this machine, and say which: an evening of a GPU, or minutes of a CPU."""
    import torch

    chosen = "evening" if torch.cuda.is_available() else "minutes"
    logger.info("--config %s, chosen for this machine; others: minutes, evening, paper", chosen)
    return chosen


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    """Add --task."""
    parser.add_argument(
        "--task", help="a task of the field (`meddino-eval tasks list`): --data is the folder of its published files"
    )


def data_of(arguments: argparse.Namespace) -> tuple[Path, dict[str, Path], list[str]]:
    """Return the data set, the test sets from elsewhere and the overrides of a command with --data, --task and --test."""
    tests = {name: Path(folder) for name, folder in named(arguments.test, "--test")}
    if arguments.task is None:
        return arguments.data, tests, list(arguments.overrides)
    from meddino_evaluation.tasks.definition import load_task
    from meddino_evaluation.tasks.prepare import prepare_task

    prepared = prepare_task(load_task(arguments.task), arguments.data, arguments.out / "data")
    return prepared.data, prepared.tests | tests, [*prepared.overrides, *arguments.overrides]


def add_test_argument(parser: argparse.ArgumentParser) -> None:
    """Add --test, which may be given several times."""
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="NAME=DATASET",
        help="a data set from elsewhere (another hospital, another scanner) on which every network is tested too",
    )


def named(entries: Sequence[str], option: str) -> list[tuple[str, str]]:
    """Return NAME=VALUE arguments as pairs.

    Raises:
        ConfigError: An entry has no name or no value, or names repeat.
    """
    pairs = [tuple(entry.partition("=")[::2]) for entry in entries]
    for entry, (name, value) in zip(entries, pairs, strict=True):
        if not name or not value or "/" in name:
            raise ConfigError(f"{option} {entry}: expected NAME=..., for example exported=model/")
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ConfigError(f"{option}: names repeat: {names}")
    return [(str(name), str(value)) for name, value in pairs]


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval segment`."""
    from meddino.core.config import load_config
    from meddino_evaluation.segmentation.config import SegmentConfig
    from meddino_evaluation.segmentation.run import segment

    data, tests, overrides = data_of(arguments)
    config = load_config(SegmentConfig, [arguments.config or default_config()], overrides, kind="evaluation")
    metrics = segment(config, arguments.model, data, arguments.out, arguments.corpus, tests)
    lines = [f"{metrics['model']['name']}: {summary_line(metrics)}"]
    lines += [f"{name}: {summary_line(part)}" for name, part in metrics["external"].items()]
    sys.stdout.write("\n".join(lines) + f"\nreport: {arguments.out / 'report.html'}\n")


def summary_line(metrics: dict[str, Any]) -> str:
    """Return one line for people: mean and spread of the test Dice, and what could not be read."""
    test = metrics["test"]
    mean, std = test["dice"]["mean"], test["dice"]["std"]
    number = "undefined" if mean is None else f"{mean:.4f}" + ("" if std is None else f" +- {std:.4f}")
    left_out = f", left out: {', '.join(metrics['failed'])}" if metrics["failed"] else ""
    return f"test Dice {number} ({test['cases']} cases, {len(test['seeds'])} seeds{left_out})"
