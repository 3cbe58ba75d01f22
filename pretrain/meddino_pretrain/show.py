"""`meddino-pretrain show`: a recipe with everything that its files leave to others."""

import argparse
from collections.abc import Sequence

from meddino.core.command import command_parser, run_command, write_line
from meddino.core.show_config import resolve_config, show_config
from meddino_pretrain.config import PretrainConfig


def main(argv: Sequence[str]) -> int:
    """Run `meddino-pretrain show`."""
    parser = command_parser(
        "meddino-pretrain show",
        "Print a recipe in full: every value with its unit and source, and in brackets the file or override that gave it. "
        "What is printed is a recipe itself.",
        "meddino-pretrain show smoke --against cpu_small",
    )
    parser.add_argument("recipe", help="a YAML file, the name of a shipped recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the recipe")
    parser.add_argument("--against", metavar="OTHER", help="print only the values in which it differs from this recipe or run")
    parser.add_argument("--stages", action="store_true", help="print only the names of its stages, one a line")
    return run_command(parser, argv, _show)


def _show(arguments: argparse.Namespace) -> None:
    if arguments.stages:
        config, _ = resolve_config(PretrainConfig, arguments.recipe, arguments.overrides, "pretrain")
        write_line("\n".join(config.stages))
    else:
        write_line(show_config(PretrainConfig, arguments.recipe, arguments.overrides, "pretrain", arguments.against))
