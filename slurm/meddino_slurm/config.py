"""The site profile: what a cluster wants to be told, and how much each command may take of it."""

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field

from meddino.core.config import StrictConfig

TIME_FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"


def time_limit_min(text: str) -> int:
    """Return a SLURM time limit in minutes, rounded up as SLURM does.

    Args:
        text: One of SLURM's six forms, such as "90", "12:00:00" or "2-00".

    Raises:
        ValueError: It is none of them, or zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?", text.strip())
    if not match:
        raise ValueError(f"a time limit is {TIME_FORMS}, not {text!r}")
    days, first, second, third = match.groups()
    if days is not None:
        seconds = int(days) * 86400 + int(first) * 3600 + int(second or 0) * 60 + int(third or 0)
    elif third is not None:
        seconds = int(first) * 3600 + int(second) * 60 + int(third)
    else:
        seconds = int(first) * 60 + int(second or 0)
    if seconds == 0:
        raise ValueError("a time limit of zero ends the job before it starts")
    return math.ceil(seconds / 60)


def _checked_time(value: object) -> object:
    if not isinstance(value, str):  # pydantic turns a ValueError into its message, a TypeError into a crash
        raise ValueError(  # noqa: TRY004
            "a time limit has to stand in quotes: without them YAML reads 12:30:00 as the number 45000"
        )
    time_limit_min(value)
    return value


TimeLimit = Annotated[str, BeforeValidator(_checked_time)]


class ResourcesConfig(StrictConfig):
    """What one job of a command takes."""

    time: TimeLimit
    """Time limit, quoted, as SLURM writes it: "90" (minutes), "12:00:00" or "2-00:00:00". Ours."""
    nodes: int = Field(1, ge=1)
    """Machines. Ours."""
    tasks_per_node: int = Field(1, ge=1)
    """Processes on each machine; for training one for each GPU. Ours."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each machine. Ours."""
    cpus_per_task: int = Field(1, ge=1)
    """CPU cores of each process; with one process a GPU this is the site's CPUs per GPU. Ours."""
    memory_gib_per_node: int | None = Field(None, ge=0)
    """Memory of each machine in GiB; 0 takes all of it, null the site's default. Ours."""
    threads_per_task: int = Field(1, ge=1)
    """OMP_NUM_THREADS of each process. Ours: with more, two torch processes slow each other 4 to 18 times."""
    partition: str | None = None
    """Instead of the profile's partition, for this command only. Ours."""


class ContainerConfig(StrictConfig):
    """The Apptainer image in which a command runs; meddino-submit itself runs outside of it."""

    image: str
    """An image file or folder that holds an installed MedDINO. Ours."""
    binds: tuple[str, ...] = ()
    """Folders to show inside, as --bind takes them. Ours."""
    options: tuple[str, ...] = ("--nv",)
    """More options of `apptainer exec`; --nv shows the GPUs. Apptainer's manual."""


class SiteConfig(StrictConfig):
    """A cluster as its users see it. Every command has a section of its own."""

    partition: str | None = None
    """Partition; null takes the site's default. Ours."""
    account: str | None = None
    """Account the time is booked on. Ours."""
    qos: str | None = None
    """Quality of service. Ours."""
    constraint: str | None = None
    """Node features, such as "a100&nvlink". Ours."""
    exclude: str | None = None
    """Nodes to keep away from, such as "gpu[003,007]". Ours."""
    sbatch: dict[str, str] = {}
    """Any other sbatch option by its long name, such as {reservation: teaching}. Ours."""
    setup: tuple[str, ...] = ()
    """Shell lines run before the command: module load, source venv/bin/activate. Ours."""
    setup_must_succeed: bool = True
    """Whether a setup line that fails ends the job as failed (set -e); false goes on without it. Ours."""
    environment: dict[str, str] = {}
    """Variables for every process, such as {NCCL_SOCKET_IFNAME: ib0}. Ours."""
    gpu: str | None = None
    """Kind of the GPUs for the plan of a pretraining (meddino-pretrain --plan): a100, h100, ...; null: not known. Ours."""
    container: ContainerConfig | None = None
    """Run the command in an image; null runs it as it is installed. Ours."""
    signal_lead_s: int = Field(120, ge=10)
    """Seconds before the time limit at which every process saves and stops. Ours: covers a step and a save."""
    attempts_without_progress: int = Field(3, ge=1)
    """A job that restarted this often without one new checkpoint gives up. Ours."""
    node_timeout_s: int = Field(45, ge=15)
    """A machine silent for this many seconds is taken for dead, and the job starts anew. Ours: within a minute."""
    array_parallel: int = Field(16, ge=1)
    """Parts of an array that run at the same time. Ours."""
    curate: ResourcesConfig
    pretrain: ResourcesConfig
    export: ResourcesConfig
    eval: ResourcesConfig
    study: ResourcesConfig
    demo: ResourcesConfig

    def resources_for(self, command: str) -> ResourcesConfig:
        """Return the section of a command."""
        sections = {
            "curate": self.curate,
            "pretrain": self.pretrain,
            "export": self.export,
            "eval": self.eval,
            "study": self.study,
            "demo": self.demo,
        }
        return sections[command]

    def partition_for(self, command: str) -> str | None:
        """Return where a command runs; None leaves it to the site."""
        return self.resources_for(command).partition or self.partition
