"""`meddino-submit`: the other commands on SLURM."""

import argparse
import sys
from collections.abc import Sequence

from meddino.core.command import command_parser, run_command
from meddino.core.config import load_config
from meddino.core.errors import MedDINOError
from meddino_slurm.config import SiteConfig
from meddino_slurm.status import ASKING, ask_command
from meddino_slurm.submit_command import submit_command
from meddino_slurm.work import PROGRAMS

EXAMPLE = """meddino-submit --cluster dgx pretrain smoke --corpus corpus --out run
  meddino-submit --cluster dgx --parts 64 curate build scans --out corpus
  meddino-submit --dry-run --set pretrain.nodes=4 pretrain ct3m_vitb --corpus corpus --out run
  meddino-submit status run
  meddino-submit logs run -f
  meddino-submit cancel run"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `meddino-submit`."""
    arguments = command_parser("meddino-submit", "Run a MedDINO command on SLURM, or ask about jobs.", EXAMPLE)
    arguments.add_argument("--cluster", default="site", help="site profile: a YAML file or the name of a shipped one")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the profile")
    arguments.add_argument(
        "--executor",
        choices=["slurm", "local", "debug"],
        default="slurm",
        help="local: here, in the background; debug: here, in the foreground",
    )
    arguments.add_argument("--dry-run", action="store_true", help="only print the sbatch script and every variable")
    arguments.add_argument(
        "--unchecked", action="store_true", help="do not let pretrain check recipe, corpus, weights, memory and disk first"
    )
    arguments.add_argument(
        "--after", action="append", default=[], metavar="FOLDER|JOB", help="start after that folder's last job has ended well"
    )
    arguments.add_argument(
        "--parts",
        type=int,
        metavar="N",
        help="curate build or a study as an array of N parts, then a merge; again: only what has not ended well",
    )
    arguments.add_argument(
        "--chain-stages", action="store_true", help="pretrain as one job for each stage instead of one for all"
    )
    arguments.add_argument("--jobs", metavar="FOLDER", help="where logs go for a command that has no --out")
    arguments.add_argument(
        "command", choices=[*PROGRAMS, *ASKING], help="what to run (as its own command), or status, logs, cancel FOLDER"
    )
    arguments.add_argument("arguments", nargs=argparse.REMAINDER, help="as for the command itself")
    return arguments


def handle(arguments: argparse.Namespace) -> None:
    """Do what was asked."""
    if arguments.command in ASKING:
        ask_command(arguments.command, arguments.arguments)
        return
    if not arguments.arguments:
        raise MedDINOError(f"'{arguments.command}' needs its arguments, as meddino-{arguments.command} does; see its --help")
    submit_command(arguments, load_config(SiteConfig, [arguments.cluster], arguments.set, kind="slurm"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `meddino-submit`."""
    return run_command(parser(), argv, handle)


if __name__ == "__main__":
    sys.exit(main())
