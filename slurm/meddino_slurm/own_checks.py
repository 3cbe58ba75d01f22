"""What a command itself says of what it was given."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import EXIT_DONE
from meddino.core.errors import MedDINOError


def ask_pretrain(arguments: Sequence[str]) -> str:
    """Run `meddino-pretrain` with arguments that it answers at once, and return what it prints.

    Raises:
        MedDINOError: In the command's own words.
    """
    beside = Path(sys.executable).absolute().with_name("meddino-pretrain")
    run = subprocess.run([str(beside), *arguments], capture_output=True, text=True, check=False)
    if run.returncode != EXIT_DONE:
        lines = run.stderr.strip().splitlines() or [f"meddino-pretrain ended with {run.returncode}"]
        raise MedDINOError(lines[-1].partition(": error: ")[2] or lines[-1])
    return run.stdout
