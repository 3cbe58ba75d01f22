"""`meddino-eval`: exported models in, measured results out. Each subcommand is one module, named in `COMMANDS`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from meddino.core.command import command_parser, run_command
from meddino.core.files import locked_folder, remove_leftovers

COMMANDS = {
    "segment": ("meddino_evaluation.segmentation.segment_command", "train a head on a labelled data set and test it"),
    "probe": ("meddino_evaluation.segmentation.dense_probe.command", "what frozen patch tokens tell of labels, in seconds"),
    "predict": ("meddino_evaluation.segmentation.predict_command", "segment new volumes with what segment has trained"),
    "prompt": ("meddino_evaluation.prompts.command", "train SAM's mask decoder on a frozen model; masks from boxes or points"),
    "score": ("meddino_evaluation.metrics.score_command", "measure any folder of label maps against references"),
    "compare": ("meddino_evaluation.study.compare_command", "several encoders x what learns, with tests and one table"),
    "knn": ("meddino_evaluation.classification.commands", "nearest neighbours on frozen features"),
    "linear": ("meddino_evaluation.classification.commands", "logistic regression, linear and MLP heads on frozen features"),
    "few-shot": ("meddino_evaluation.classification.commands", "the same on few patients a class, several draws"),
    "finetune": ("meddino_evaluation.classification.commands", "train the backbone: end to end, partly, LoRA, BitFit"),
    "detect": ("meddino_evaluation.detection.command", "train a detector on a backbone and test it: AP and FROC"),
    "retrieve": ("meddino_evaluation.classification.commands", "find cases of the same class among other patients"),
    "study": ("meddino_evaluation.study.study_command", "many backbones, protocols and data sets as one job list"),
    "datasets": ("meddino_evaluation.classification.datasets_command", "shipped definitions of labelled data sets"),
    "tasks": (
        "meddino_evaluation.tasks.command",
        "the tasks of the field: definitions, fake copies, published files made readable",
    ),
    "nnunet-plans": ("meddino_evaluation.nnunet.plans_command", "plans with which nnU-Net fine-tunes a model"),
    "weights": (
        "meddino_evaluation.backbones.weights_command",
        "published weights: where from, which are here; check one",
    ),
    "show": ("meddino_evaluation.show_command", "every setting of a command with its unit and source"),
    "visualize": ("meddino_evaluation.visualization.visualize_command", "PCA, similarity maps and t-SNE of features"),
}
"""Name: (module with `add_arguments(parser)` and `run(arguments)`, one line of help)."""


UNLOCKED = frozenset({"datasets", "nnunet-plans", "weights", "show"})
"""Commands that two may run at a time in one folder; results of the others would mix."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `meddino-eval`."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = command_parser(
        "meddino-eval",
        "Measure an exported model on labelled data.",
        "meddino-eval segment --model model/ --data Dataset900_Phantom --out results/ --config minutes",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in words if word in COMMANDS), None)  # the first: `study compare` is no `compare`
    for name, (module, help_line) in COMMANDS.items():
        own = subparsers.add_parser(name, help=help_line, description=help_line)
        # Only the module of the command that is called is imported: --help stays fast.
        if name == called:
            importlib.import_module(module).add_arguments(own)
    return run_command(parser, words, _handle)


def _handle(arguments: argparse.Namespace) -> None:
    logging.getLogger("highdicom").setLevel(logging.WARNING)
    run = importlib.import_module(COMMANDS[arguments.command][0]).run
    out = getattr(arguments, "out", None)
    if out is None or not _works_alone(arguments):
        run(arguments)
        return
    with locked_folder(out):
        remove_leftovers(out)
        run(arguments)


def _works_alone(arguments: argparse.Namespace) -> bool:
    """False where others may write into the same folder: parts of a comparison do on purpose, each on jobs of its own."""
    if not hasattr(arguments, "part"):
        return arguments.command not in UNLOCKED
    from meddino_evaluation.study.jobs import parse_part

    return arguments.command not in UNLOCKED and parse_part(arguments.part) is None and not arguments.list


if __name__ == "__main__":
    sys.exit(main())
