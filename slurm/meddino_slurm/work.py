"""What one job does: a MedDINO command exactly as a user would type it, and where its traces go."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meddino.core.errors import MedDINOError
from meddino_slurm.config import ResourcesConfig, SiteConfig

PROGRAMS: dict[str, tuple[str, ...]] = {
    "curate": ("meddino-curate",),
    "pretrain": ("meddino-pretrain",),
    "export": ("meddino-export",),
    "eval": ("meddino-eval",),
    "study": ("meddino-eval", "study"),
    "demo": ("meddino-demo",),
}
# A model folder is given away and a corpus is content with checksums: no link to logs in those.
LINKED = ("pretrain", "eval", "study", "demo")
JOB_FOLDER_SUFFIX = ".slurm"


@dataclass(frozen=True)
class Work:
    """One job. Plain values only: it is pickled by submitit and read again after every requeue.

    Attributes:
        command: Which section of the profile it takes: "curate", "pretrain", ...
        key: Name of its record, its lock and its logs in `folder`: "pretrain", "curate-3-of-8".
        program: How the command starts, the container included.
        arguments: What the user typed after it.
        out: The folder the command writes (its --out).
        nodes: Machines.
        tasks_per_node: Processes on each.
        cpus_per_task: Cores of each process.
        environment: Variables set for every process on top of what the job already has.
        attempts_without_progress: After so many restarts without a new checkpoint the job gives up.
        node_timeout_s: A machine silent for so long is dead.
    """

    command: str
    key: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    out: Path
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    environment: tuple[tuple[str, str], ...]
    attempts_without_progress: int
    node_timeout_s: int

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line of every process."""
        return (*self.program, *self.arguments)

    @property
    def folder(self) -> Path:
        """Where logs, records and locks lie: beside `out`, which commands replace as a whole."""
        return job_folder(self.out)

    @property
    def tasks(self) -> int:
        """All processes."""
        return self.nodes * self.tasks_per_node

    def task_log(self, job_id: str, rank: str) -> Path:
        """Return where a process writes; `rank` may be srun's %t."""
        return self.folder / f"{job_id}.{self.key}.rank-{rank}.log"


def job_folder(out: Path) -> Path:
    """Return the folder of logs and records of a run folder."""
    return out.with_name(out.name + JOB_FOLDER_SUFFIX)


def make_work(
    site: SiteConfig, command: str, arguments: Sequence[str], jobs: str | None = None, part: str | None = None
) -> Work:
    """Describe a job.

    Args:
        site: The site profile.
        command: One of `PROGRAMS`.
        arguments: As for the command itself.
        jobs: Folder name for the traces of a command that has no --out.
        part: "3/8" for one part of an array.

    Raises:
        MedDINOError: No --out among the arguments.
    """
    resources = site.resources_for(command)
    out = Path(jobs) if jobs else _out_folder(command, arguments)
    return Work(
        command=command,
        key=f"{command}-{part.replace('/', '-of-')}" if part else command,
        program=program(site, command),
        arguments=(*arguments, *(("--part", part) if part else ())),
        out=out.absolute(),
        nodes=resources.nodes,
        tasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task,
        environment=task_environment(site, resources),
        attempts_without_progress=site.attempts_without_progress,
        node_timeout_s=site.node_timeout_s,
    )


def program(site: SiteConfig, command: str) -> tuple[str, ...]:
    """Return how a command starts: in the container, else beside this Python, else by name."""
    name, *rest = PROGRAMS[command]
    if site.container:
        binds = [word for bind in site.container.binds for word in ("--bind", bind)]
        return ("apptainer", "exec", *site.container.options, *binds, site.container.image, name, *rest)
    # absolute(), not resolve(): a virtual environment's python is a link to the system's.
    beside = Path(sys.executable).absolute().with_name(name)
    return (str(beside) if beside.exists() else shutil.which(name) or name, *rest)


def task_environment(site: SiteConfig, resources: ResourcesConfig) -> tuple[tuple[str, str], ...]:
    """Return the variables every process gets from the launcher, the profile's own last."""
    own = {
        "OMP_NUM_THREADS": str(resources.threads_per_task),
        "PYTHONUNBUFFERED": "1",  # logs can be followed
    }
    return tuple(sorted({**own, **site.environment}.items()))


def _out_folder(command: str, arguments: Sequence[str]) -> Path:
    for place, word in enumerate(arguments):
        if word == "--out" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if word.startswith("--out="):
            return Path(word.removeprefix("--out="))
    raise MedDINOError(
        f"'{command}' needs --out FOLDER: logs and records of the job go beside it; "
        "for a command without --out give meddino-submit --jobs FOLDER"
    )
