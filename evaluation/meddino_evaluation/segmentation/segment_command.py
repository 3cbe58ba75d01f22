"""`meddino-eval segment`: its arguments and what it prints."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval segment`."""
    parser.add_argument(
        "--model", required=True, help="export folder, weights file, random:<backbone> or random:<export folder>"
    )
    parser.add_argument("--data", required=True, type=Path, help="data set in nnU-Net's raw layout")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; the same command again goes on there")
    parser.add_argument("--corpus", type=Path, help="corpus the model was pretrained on: test volumes in it are marked")
    parser.add_argument(
        "--config", default="segment", help="YAML file or shipped name (segment: the paper's setting; demo: minutes)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys to set, e.g. seeds=[0,1,2] head.name=linear"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval segment`."""
    from meddino.core.config import load_config
    from meddino_evaluation.segmentation.config import SegmentConfig
    from meddino_evaluation.segmentation.run import segment

    config = load_config(SegmentConfig, [arguments.config], arguments.overrides, kind="evaluation")
    metrics = segment(config, arguments.model, arguments.data, arguments.out, arguments.corpus)
    sys.stdout.write(summary_line(metrics) + f"\nreport: {arguments.out / 'report.html'}\n")


def summary_line(metrics: dict[str, Any]) -> str:
    """Return one line for people: mean and spread of the test Dice."""
    test = metrics["test"]
    mean, std = test["dice"]["mean"], test["dice"]["std"]
    number = "undefined" if mean is None else f"{mean:.4f}" + ("" if std is None else f" +- {std:.4f}")
    return f"{metrics['model']['name']}: test Dice {number} ({test['cases']} cases, {len(test['seeds'])} seeds)"
