"""`meddino-eval detect`: a detector on a backbone, trained and tested on one data set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meddino_evaluation.metrics.figures import add_figures_argument

if TYPE_CHECKING:
    from meddino_evaluation.tasks.definition import TaskDefinition


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval detect`."""
    parser.add_argument("--model", required=True, help="backbone: an export, a weights file, a catalogue name, random:<name>")
    parser.add_argument(
        "--data",
        required=True,
        help="CSV (image,x1,y1,x2,y2,label,patient), COCO file, folder in the layout of COCO, VOC or Kvasir-SEG, or a task",
    )
    parser.add_argument("--root", type=Path, help="folder of the data, for a task's name")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; the same command again goes on there")
    parser.add_argument("--config", default="detection", help="YAML file or shipped name")
    add_figures_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. detector.name=retinanet encoder.mode=frozen")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval detect`."""
    content = run_detection(
        arguments.model, arguments.data, arguments.root, arguments.out, arguments.overrides, arguments.config, arguments.figures
    )
    sys.stdout.write(content + f"report: {arguments.out / 'report.html'}\n")


def run_detection(
    model: str,
    data: "str | TaskDefinition",
    root: Path | None,
    out: Path,
    overrides: list[str],
    config_name: str = "detection",
    figures: str | None = None,
) -> str:
    """Open data and model, train, test and report; a task's own settings stand before those of the user.

    Returns:
        The table of results as Markdown.
    """
    from meddino.core.config import load_config
    from meddino_evaluation.backbones.load import load_backbone
    from meddino_evaluation.detection.config import DetectConfig
    from meddino_evaluation.detection.dataset import open_detection
    from meddino_evaluation.detection.report import write_report
    from meddino_evaluation.detection.run import detect

    config = load_config(DetectConfig, [config_name], overrides, kind="evaluation")
    dataset = open_detection(data, root, config.data)
    if dataset.overrides:
        config = load_config(DetectConfig, [config_name], [*dataset.overrides, *overrides], kind="evaluation")
    backbone = load_backbone(model)
    content = detect(backbone, dataset, config, out)
    return write_report(content, out, dataset, figures).markdown()


def run_task(task: "TaskDefinition", model: str, root: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Run a task of kind detection; `out` holds metrics.json (with the headline) and per_case.csv.

    Args:
        task: The task.
        model: As `load_backbone` takes it.
        root: Folder of the published files.
        out: Folder of the results; the same call again goes on there.
        overrides: `key=value` over the recipe and the task's own.
    """
    run_detection(model, task, root, out, list(overrides))
