"""`meddino-eval knn | linear | few-shot | finetune | retrieve`: one backbone on one data set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meddino_evaluation.metrics.figures import add_figures_argument

if TYPE_CHECKING:
    from meddino_evaluation.tasks.definition import TaskDefinition

DEFAULT_PROTOCOLS = {"knn": ("knn",), "linear": ("logistic", "linear", "mlp"), "finetune": ("finetune",)}
"""What a command runs unless a config or `protocols=[...]` says otherwise."""
RECIPE = "lvm_med_classification"
"""Settings of a task, before its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that these commands share."""
    parser.add_argument(
        "--model",
        required=True,
        help="export folder, random:<name>, <name>@<weights file>, catalogue name, NAME=any of them",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="folder of class folders, CSV (image, label [, patient, split]), YAML file, or shipped name (`datasets list`)",
    )
    parser.add_argument("--root", type=Path, help="folder of the data, for a shipped name or a YAML file that lies elsewhere")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--config", default="classification", help="YAML file or shipped name")
    add_figures_argument(parser)
    parser.add_argument("--columns", help="of results_compact, separated by commas, e.g. auroc,accuracy,brier")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. protocols=[lora,bitfit] split.repeats=5")


def run(arguments: argparse.Namespace) -> None:
    """Run the command that was named."""
    from meddino.core.config import load_config
    from meddino_evaluation.backbones.load import load_backbone
    from meddino_evaluation.classification.config import ClassificationConfig
    from meddino_evaluation.classification.evaluate import evaluate
    from meddino_evaluation.classification.recognise import open_labelled
    from meddino_evaluation.classification.report import chosen_columns, write_report
    from meddino_evaluation.classification.retrieval import retrieve
    from meddino_evaluation.metrics.text_table import metric_text

    config = load_config(ClassificationConfig, [arguments.config], arguments.overrides, kind="evaluation")
    if arguments.command in DEFAULT_PROTOCOLS and "protocols" not in config.model_fields_set:
        config = config.model_copy(update={"protocols": DEFAULT_PROTOCOLS[arguments.command]})
    columns = chosen_columns(arguments.columns)
    dataset = open_labelled(arguments.data, arguments.root)
    backbone = load_backbone(arguments.model)
    if arguments.command == "retrieve":
        found = retrieve(backbone, dataset, config, arguments.out)
        lines = [f"{name}: {metric_text(values)}" for name, values in found["metrics"].items()]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    content = evaluate(backbone, dataset, config, arguments.out, few_shot=arguments.command == "few-shot")
    table = write_report(content, arguments.out, dataset, arguments.figures, columns)
    sys.stdout.write(table.markdown() + f"report: {arguments.out / 'report.html'}\n")


def run_task(task: "TaskDefinition", model: str, root: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Run a task of kind classification; `out` holds metrics.json (a result for each protocol) and per_case.csv.

    Args:
        task: The task.
        model: As `load_backbone` takes it.
        root: Folder of the published files.
        out: Folder of the results.
        overrides: `key=value` over the task's own.
    """
    from meddino.core.config import load_config
    from meddino_evaluation.backbones.load import load_backbone
    from meddino_evaluation.classification.config import ClassificationConfig
    from meddino_evaluation.classification.evaluate import evaluate
    from meddino_evaluation.classification.recognise import open_labelled
    from meddino_evaluation.classification.report import write_report
    from meddino_evaluation.tasks.definition import LabelledLayout

    assert isinstance(task.layout, LabelledLayout)  # the definition is refused otherwise
    words = [*task.overrides, *overrides]
    config = load_config(ClassificationConfig, [RECIPE], words, kind="evaluation")
    dataset = open_labelled(task.layout.dataset, root)
    write_report(evaluate(load_backbone(model), dataset, config, out), out, dataset, figures=None)
