"""The processes of a job: started by srun on its machines, or here without SLURM."""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from meddino.core.logging import get_logger
from meddino.distributed.exit_codes import Ending
from meddino.distributed.launcher import LocalProcesses, free_port, rank_variables
from meddino_slurm import slurm
from meddino_slurm.work import Work

log = get_logger(__name__)

BEAT_S = 5
KILL_WAIT_S = 10

# slurmstepd's words for how a task ended, as srun repeats them.
_TASK_LINE = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,\-\[\]]+): (?P<how>.+?)\s*$")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_NODE_LINE = re.compile(r"^srun: error: Node failure on (?P<node>\S+)")


class SrunStep:
    """The processes of a SLURM job: rank, size and place come to them from srun."""

    def __init__(self, work: Work, job_id: str, environment: Mapping[str, str]) -> None:
        command = srun_command(work, job_id)
        log.info("starting: %s", shlex.join(command))
        self._process = subprocess.Popen(
            command, env=dict(environment), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        self._endings: list[Ending] = []
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def exit_code(self) -> int | None:
        """Return srun's exit code, or None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=KILL_WAIT_S)
        return code

    def endings(self) -> list[Ending]:
        """Return what srun has said about processes that failed."""
        return list(self._endings)

    def signal(self, number: int) -> None:
        """Do nothing: SLURM delivers its signals to the processes itself."""

    def kill(self) -> None:
        """End the step. srun gives up on machines that do not answer after a few seconds; it is killed if it does not."""
        with suppress(ProcessLookupError):
            # The first interrupt only reports; srun ends the step on SIGTERM.
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            log.info("%s", line.rstrip())
            if ending := read_srun_line(line):
                self._endings.append(ending)


def read_srun_line(line: str) -> Ending | None:
    """Return what a line on srun's stderr says about the end of a process; None if it says something else."""
    if node := _NODE_LINE.match(line):
        return Ending("?", node["node"], None, "node failure")
    task = _TASK_LINE.match(line)
    if not task:
        return None
    code = _EXIT_CODE.search(task["how"])
    return Ending(task["tasks"], task["node"], int(code[1]) if code else None, task["how"])


def srun_command(work: Work, job_id: str) -> list[str]:
    """Return the srun line that starts the processes of a job."""
    return [
        "srun",
        f"--nodes={work.nodes}",
        f"--ntasks={work.tasks}",
        f"--ntasks-per-node={work.tasks_per_node}",
        # Since 22.05 srun no longer takes this over from sbatch.
        f"--cpus-per-task={work.cpus_per_task}",
        "--unbuffered",
        "--open-mode=append",
        f"--output={work.task_log(job_id, '%t')}",
        # The supervisor waits a little for the others' own exit codes and then ends the step itself.
        "--kill-on-bad-exit=0",
        "--wait=0",
        *work.argv,
    ]


def local_step(work: Work, job_id: str, environment: Mapping[str, str], foreground: bool = False) -> LocalProcesses:
    """Start the processes of a job on this machine, without SLURM; in the foreground the first one has the terminal."""
    places = [rank_variables(rank, work.tasks) if work.tasks > 1 else {} for rank in range(work.tasks)]
    logs = [work.task_log(job_id, str(rank)) for rank in range(work.tasks)]
    return LocalProcesses(work.argv, [{**environment, **place} for place in places], logs, foreground)


class Heartbeats:
    """Tells when a machine of a job has gone silent, which its network connections may not say for a quarter of an hour.

    One more, tiny step prints a word every few seconds on each machine; srun brings the words here. SLURM's own
    SlurmdTimeout (five minutes on many sites) stays the second line.
    """

    def __init__(self, work: Work) -> None:
        self._timeout_s = work.node_timeout_s
        self._last: dict[str, float] = {}
        self._stopped = False
        self._process: subprocess.Popen[str] | None = None
        if work.nodes > 1:
            self._process = subprocess.Popen(
                heartbeat_command(work), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def silent_node(self) -> str | None:
        """Return a machine that was heard once and has been silent for too long, while others were heard.

        When all are silent, this machine's own heartbeat too, it is the heartbeats that are at fault and not the machines.
        """
        if self._process is None or self._process.poll() is not None:
            return None
        now = time.monotonic()
        silent = [node for node, last in self._last.items() if now - last > self._timeout_s]
        return silent[0] if silent and len(silent) < len(self._last) else None

    def stop(self) -> None:
        """End the step."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=KILL_WAIT_S)
                return

    def _read(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            self._last[line.strip()] = time.monotonic()


def heartbeat_command(work: Work) -> list[str]:
    """Return the srun line of the heartbeats; they take nothing from the job and ignore the signals meant for it."""
    beat = f"trap '' USR1 USR2; while echo $SLURMD_NODENAME; do sleep {BEAT_S}; done"
    size = [f"--nodes={work.nodes}", f"--ntasks={work.nodes}", "--ntasks-per-node=1", "--cpus-per-task=1"]
    return ["srun", "--overlap", *size, "--mem=0", "--gres=none", "--unbuffered", "--quiet", "sh", "-c", beat]


def visible_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has, without starting torch."""
    return sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in Path("/dev").iterdir())


def rendezvous(first_host: str) -> dict[str, str]:
    """Return where the processes meet: a port that is free now on the first machine, which is this one."""
    return {"MASTER_ADDR": first_host, "MASTER_PORT": free_port()}


def base_environment() -> dict[str, str]:
    """Return this process's variables without what describes it as a task of its own."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in slurm.without_slurm_tasks(os.environ).items() if name not in own}
