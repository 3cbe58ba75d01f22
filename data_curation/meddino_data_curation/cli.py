"""The command `meddino-curate`."""

from collections.abc import Sequence

from meddino.core.command import command_parser, run_command
from meddino_data_curation.changing_commands import add_changing_commands
from meddino_data_curation.reading_commands import add_reading_commands
from meddino_data_curation.writing_commands import add_writing_commands

_EXAMPLE = "meddino-curate phantom --out cohort && meddino-curate build cohort/ct --out corpus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("meddino-curate", "Turn CT volumes into a corpus to pretrain on.", _EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_writing_commands(commands)
    add_changing_commands(commands)
    add_reading_commands(commands)
    return run_command(parser, argv, lambda arguments: arguments.handle(arguments))
