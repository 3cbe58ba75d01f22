"""`meddino-eval prompt`: its arguments and what it prints."""

import argparse
import sys
from pathlib import Path

from meddino.data.remote import corpus_location
from meddino_evaluation.segmentation.segment_command import add_task_argument, add_test_argument, data_of, summary_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval prompt`."""
    parser.add_argument("--model", required=True, help="export, run, weights file or random:<backbone>; it is held")
    parser.add_argument("--data", required=True, type=Path, help="labelled data set, in any layout `segment` reads")
    add_task_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; the same command again goes on there")
    parser.add_argument("--corpus", type=corpus_location, help="corpus that the model learned from: its volumes are marked")
    add_test_argument(parser)
    parser.add_argument("--config", default="prompt", help="YAML file or shipped name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set, e.g. size_px=256 seeds=[0]")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval prompt`."""
    from meddino.core.config import load_config
    from meddino_evaluation.prompts.config import PromptConfig
    from meddino_evaluation.prompts.run import prompt

    data, tests, overrides = data_of(arguments)
    config = load_config(PromptConfig, [arguments.config], overrides, kind="evaluation")
    metrics = prompt(config, arguments.model, data, arguments.out, arguments.corpus, tests)
    lines = [f"{metrics['model']['name']}: {summary_line(metrics)}"]
    lines += [f"{name}: {summary_line(part)}" for name, part in metrics["external"].items()]
    sys.stdout.write("\n".join(lines) + f"\nreport: {arguments.out / 'report.html'}\n")
