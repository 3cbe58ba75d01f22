"""What a command itself says of what it was given, before it waits in a queue."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import EXIT_DONE
from meddino.core.errors import MedDINOError
from meddino_slurm.config import SiteConfig

# Asks of meddino-pretrain, which has no folder to write and nothing to check.
NO_RUN = ("bench", "show")


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


def own_checks(site: SiteConfig, command: str, arguments: Sequence[str], waits: bool) -> str:
    """Let the command look at what it was given: recipe, corpus, weights, batch, memory, time and disk.

    Args:
        site: The profile, for the machines the job would get.
        command: Which command; those without checks of their own are taken as they are.
        arguments: As for the command itself.
        waits: Whether other jobs run before it, which may still make its corpus.

    Returns:
        What the command says, for people; empty where it has nothing to say.

    Raises:
        MedDINOError: In the command's own words.
    """
    if command != "pretrain" or arguments[0] in NO_RUN:
        return ""
    resources = site.resources_for(command)
    machine = [f"{resources.nodes}x{resources.tasks_per_node}"]
    if resources.gpus_per_node and site.gpu is not None:
        machine.append(site.gpu)
    return ask_pretrain([*arguments, "--plan", "--machine", "x".join(machine), *(["--corpus-comes"] if waits else [])])
