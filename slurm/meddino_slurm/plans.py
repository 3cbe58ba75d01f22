"""Which jobs a submission becomes: one, an array with its merge, or one for each stage; what the command says of it first."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meddino.core.command import EXIT_DONE
from meddino.core.errors import MedDINOError
from meddino_slurm.config import SiteConfig
from meddino_slurm.record import read_json, record_path
from meddino_slurm.work import Work, make_work

# Asks of meddino-pretrain, which has no folder to write and nothing to check.
NO_RUN = ("bench", "show")


@dataclass(frozen=True)
class Planned:
    """One submission: a job, or an array of several.

    Attributes:
        name: For squeue and `status`.
        works: One for each element.
        waits: It starts after the submission planned before it has ended well.
    """

    name: str
    works: tuple[Work, ...]
    waits: bool = False


def job_name(*words: str) -> str:
    """Return a job's name for squeue: of each word only letters, digits, dot, dash and underscore, with _ for the rest.

    A folder may be called anything; sbatch reads its options line by line and knows no quote that goes over two.
    """
    return " ".join(re.sub(r"[^\w.-]+", "_", word) for word in words)


def plan_one(site: SiteConfig, command: str, arguments: Sequence[str], jobs: str | None = None) -> list[Planned]:
    """Plan a single job that goes through all it has to do, restarting where it was: the usual way."""
    work = make_work(site, command, arguments, jobs)
    return [Planned(job_name(command, work.out.name), (work,))]


def plan_stages(site: SiteConfig, arguments: Sequence[str]) -> list[Planned]:
    """Plan one job for each stage, each waiting for the one before: stages may then want different limits or queues."""
    if any(word == "--stage" or word.startswith("--stage=") for word in arguments):
        raise MedDINOError("--chain-stages gives each job its --stage; leave it out of the command")
    planned: list[Planned] = []
    overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
    for stage in ask_pretrain(["show", arguments[0], *overrides, "--stages"]).split():
        work = make_work(site, "pretrain", (*arguments, "--stage", stage))
        planned.append(Planned(job_name(stage, work.out.name), (work,), waits=bool(planned)))
    return planned


def plan_parts(site: SiteConfig, command: str, arguments: Sequence[str], parts: int) -> list[Planned]:
    """Plan an array of the parts that have not ended well yet, and the merge that waits for them.

    Raises:
        MedDINOError: It is neither `curate build` nor a study, or names a part already.
    """
    if parts < 2:
        raise MedDINOError(f"--parts is {parts}: give 2 or more; without it one job does everything")
    if command != "study" and (command != "curate" or not arguments or arguments[0] != "build"):
        raise MedDINOError(
            "--parts divides `curate build SOURCE... --out CORPUS` and `study KIND ... --out RESULTS`, "
            f"not '{command}'; other commands run as one job"
        )
    if any(word == "--part" or word.startswith("--part=") for word in arguments):
        raise MedDINOError("--parts gives each job its --part; leave it out of the command")
    works = [make_work(site, command, arguments, part=f"{part}/{parts}") for part in range(1, parts + 1)]
    open_ = tuple(work for work in works if not has_ended_well(work))
    out = works[0].out
    # Without --part the same line does what no part has done, which is nothing but putting the parts together.
    merge = replace(make_work(site, command, arguments), key=f"{command}-merge")
    merging = Planned(job_name("merge", out.name), (merge,), waits=bool(open_))
    return [Planned(job_name(command, out.name), open_), merging] if open_ else [merging]


def has_ended_well(work: Work) -> bool:
    """True if the record of a piece of work says that its last attempt was done."""
    attempts = read_json(record_path(work.out, work.key), {"attempts": []})["attempts"]
    return bool(attempts) and attempts[-1]["decision"] == "done"


def submit_planned(
    planned: Sequence[Planned], submit_one: Callable[[Planned, Sequence[str]], str], after: Sequence[str]
) -> list[str]:
    """Submit what was planned, in order; returns the job ids.

    Args:
        planned: From one of the plans above.
        submit_one: Takes a submission and the job ids it waits for, returns its job id.
        after: Job ids the first submission waits for.
    """
    job_ids: list[str] = []
    for each in planned:
        job_ids.append(submit_one(each, job_ids[-1:] if each.waits else after))
    return job_ids


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


def own_checks(site: SiteConfig, command: str, arguments: Sequence[str], waits: bool, show_only: bool) -> str:
    """Let the command look at what it was given: recipe, corpus, weights, batch, memory, time and disk.

    Args:
        site: The profile, for the machines the job would get.
        command: Which command; those without checks of their own are taken as they are.
        arguments: As for the command itself.
        waits: Whether other jobs run before it, which may still make its corpus.
        show_only: Whether nothing is submitted now: a full disk is told then, since it may have room when it is.

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
    assumed = [*(["--corpus-comes"] if waits else []), *(["--warn-disk"] if show_only else [])]
    return ask_pretrain([*arguments, "--plan", "--machine", "x".join(machine), *assumed])
