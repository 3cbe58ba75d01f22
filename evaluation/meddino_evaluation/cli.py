"""`meddino-eval`: exported models in, measured results out. Each subcommand is one module, named in `COMMANDS`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from meddino.core.command import command_parser, run_command

COMMANDS = {
    "segment": ("meddino_evaluation.segmentation.segment_command", "train a head on a labelled data set and test it"),
}
"""Name: (module with `add_arguments(parser)` and `run(arguments)`, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `meddino-eval`."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = command_parser(
        "meddino-eval",
        "Measure an exported model on labelled data.",
        "meddino-eval segment --model model/ --data Dataset900_Phantom --out results/ --config demo",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        own = subparsers.add_parser(name, help=help_line, description=help_line, formatter_class=parser.formatter_class)
        # Only the module of the command that is called is imported: --help stays fast.
        if name in words:
            importlib.import_module(module).add_arguments(own)
    return run_command(parser, words, _handle)


def _handle(arguments: argparse.Namespace) -> None:
    importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)


if __name__ == "__main__":
    sys.exit(main())
