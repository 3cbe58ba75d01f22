"""What `meddino-submit status|logs|cancel FOLDER` does."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import write_line
from meddino_slurm import status

ASKING = ("status", "logs", "cancel")


def ask_command(command: str, arguments: Sequence[str]) -> None:
    """Answer `status`, `logs` or `cancel`."""
    asked = argparse.ArgumentParser(prog=f"meddino-submit {command}")
    asked.add_argument("folder", type=Path, help="the --out of the job")
    if command == "logs":
        asked.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
        asked.add_argument("--rank", default="0", help="number of a process, or supervisor")
        asked.add_argument("--job", help="of this job only")
    found = asked.parse_args(arguments)
    out = found.folder.absolute()
    if command == "status":
        write_line(status.table(out))
    elif command == "cancel":
        write_line(f"cancelled {', '.join(status.cancel(out))}")
    else:
        status.show_log(out, found.rank, found.job, found.follow)
