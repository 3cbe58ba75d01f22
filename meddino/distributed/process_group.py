"""Starting and ending the group of processes that train together: from torchrun's or SLURM's environment, or alone."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from meddino.core.errors import ConfigError, StoppedEarly
from meddino.distributed.collectives import all_gather_strings

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Distributed:
    """Where this process stands.

    Attributes:
        rank: Number among all processes.
        world_size: Number of all processes.
        local_rank: Number among the processes of this machine; chooses the accelerator.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_environment(environment: Mapping[str, str]) -> Distributed:
    """Return what torchrun or srun says about this process; alone if neither started it.

    Raises:
        ConfigError: The variables are there but make no sense.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Not SLURM_NTASKS: a batch script has that too, and there is only one of it.
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Distributed()
    try:
        number, count, local = (int(environment.get(name, "0")) for name in names)
    except ValueError as error:
        found = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(f"the launcher's environment is no set of numbers: {found}") from error
    if not 0 <= number < count:
        raise ConfigError(f"{names[0]}={number} must lie in [0, {names[1]}={count})")
    return Distributed(number, count, local)


@contextmanager
def start_distributed(timeout_s: float = 600.0) -> Iterator[Distributed]:
    """Join the process group for as long as the block lasts; does nothing for a single process.

    Tensors on the CPU talk over gloo, those on a CUDA device over NCCL.

    Args:
        timeout_s: How long a collective waits for the others before it gives up with an error. A process that dies is
            noticed at once over gloo, since its connection closes; over NCCL perhaps only then, so launchers end the
            others of a dead process themselves.

    Raises:
        ConfigError: The launcher's environment makes no sense.
        StoppedEarly: Another process is gone.
    """
    place = read_environment(os.environ)
    if place.world_size == 1:
        yield place
        return
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    os.environ.setdefault("MASTER_PORT", str(_slurm_port(os.environ)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=timeout_s), init_method="env://"
    )
    try:
        yield place
    except StoppedEarly:
        dist.destroy_process_group()  # all agreed on it
        raise
    except RuntimeError as error:
        if not _peer_is_gone(error):
            raise
        raise StoppedEarly(
            f"process {place.rank} of {place.world_size} stops: another one ended without a word, or was not heard of for "
            f"{timeout_s:.0f} s ({str(error).splitlines()[0][:200]}). Its own output says why; what was saved is whole: "
            "run the same command again"
        ) from error
    # Only now: while others are in a collective this would wait for them, and an error's traceback with it.
    dist.destroy_process_group()


def check_one_process_a_gpu(identity: str) -> None:
    """Refuse two processes on one GPU, which NCCL would end with an error that names neither. Every process calls this.

    Args:
        identity: `Machine.identity` of this process.

    Raises:
        ConfigError: Two have the same.
    """
    everyone = all_gather_strings([identity])
    shared = {gpu: [rank for rank, other in enumerate(everyone) if other == gpu] for gpu in everyone if gpu}
    for gpu, ranks in shared.items():
        if len(ranks) > 1:
            raise ConfigError(f"processes {ranks} share one GPU ({gpu}); start one process a GPU: --processes, --gpus-per-task")


def _peer_is_gone(error: RuntimeError) -> bool:
    words = str(error).lower()
    # What gloo, NCCL and the store say when the other end of a connection is gone. There is no error type for it.
    return any(
        sign in words
        for sign in (
            "connection closed",
            "connection reset",
            "broken pipe",
            "socket closed",
            "timed out",
            "remote process exited",
        )
    )


def processes_here(environment: Mapping[str, str]) -> int:
    """Return how many processes train together on this machine; all of the run where nobody says it."""
    everywhere = read_environment(environment).world_size
    names = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
    return min(
        everywhere, next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), everywhere)
    )


def first_host(node_list: str) -> str:
    """Return the first machine of a SLURM node list such as `gpu[003-005,9],login`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if not match:
        raise ConfigError(f"SLURM's node list {node_list!r} cannot be read; set MASTER_ADDR")
    return match.group(1) + (match.group(2) or "") + (match.group(3) or "")


def _slurm_port(environment: Mapping[str, str]) -> int:
    # Jobs that share a machine get ports of their own.
    return DEFAULT_PORT + int(environment.get("SLURM_JOB_ID", "0")) % 10000
