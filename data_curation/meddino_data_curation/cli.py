"""The command `meddino-curate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import command_parser, run_command
from meddino.core.logging import get_logger

_logger = get_logger(__name__)
_EXAMPLE = "meddino-curate phantom --out cohort && meddino-curate build cohort/ct --out corpus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("meddino-curate", "Turn CT volumes into a corpus to pretrain on.", _EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_phantom(commands)
    return run_command(parser, argv, lambda arguments: arguments.handle(arguments))


def _add_phantom(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("phantom", help="write the embedded cohort of procedural CT patients")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder; gets ct/ and segmentation/")
    parser.add_argument("--patients", type=int, default=16, help="patients in ct/; half as many more in segmentation/")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes")
    parser.set_defaults(handle=_phantom)


def _phantom(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.phantom.cohort import CohortSizes, write_cohort

    write_cohort(arguments.out, CohortSizes.scaled(arguments.patients), arguments.seed)
    _logger.info("wrote the phantom cohort to %s", arguments.out)
