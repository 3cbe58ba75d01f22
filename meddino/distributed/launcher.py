"""Several processes of one command: started together, told of signals together, ended together. Imports no torch.

torchrun starts processes as well, but whatever they end with, it ends with 1, and it dies of signals that it does not know.
"""

import ctypes
import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol, runtime_checkable

from meddino.core.command import EXIT_RUN_AGAIN, EXIT_WRONG_INPUT, SAID_FOLDER, STOP_SIGNALS, usable_cores
from meddino.core.logging import get_logger
from meddino.distributed.exit_codes import Ending, judge, read_return_code

LAUNCHER_PID = "MEDDINO_LAUNCHER_PID"
FORWARDED = (signal.SIGINT, *STOP_SIGNALS)
# After one has died: time for the others to notice, to save what they are saving and to end by themselves.
OTHERS_GRACE_S = 30.0
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Of a pool and its common queues, with some to spare; of one more worker.
_SEMAPHORES, _OF_A_WORKER = 16, 4
logger = get_logger(__name__)


@runtime_checkable
class Step(Protocol):
    """Processes that run together and end together."""

    def exit_code(self) -> int | None:
        """Return the exit code of the whole, or None while it runs."""

    def endings(self) -> list[Ending]:
        """Return which processes have ended with something else than 0 so far."""

    def signal(self, number: int) -> None:
        """Send a signal to every process."""

    def kill(self) -> None:
        """End every process now."""


@dataclass
class Signals:
    """Signals that have reached this process, which notes them instead of dying of them."""

    waiting: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def install(self) -> dict[int, Any]:
        """Note signals from now on; returns what was done with them before."""
        # What is ignored from the start stays so (nohup).
        heard = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        return {number: signal.signal(number, self._note) for number in heard}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals for as long as the block lasts."""
        before = self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stop(self) -> bool:
        """True if somebody asked this process to end."""
        return bool(self.seen & {signal.SIGTERM, signal.SIGINT})

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append(number)
        self.seen.add(number)


class LocalProcesses:
    """Processes of one command on this machine, one for each set of variables."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        logs: Sequence[Path | None] | None = None,
        foreground: bool = False,
    ) -> None:
        """Start them.

        Args:
            command: The same for all.
            environments: Variables of each.
            logs: A file for the output of each, appended to; None leaves it where this process's goes.
            foreground: The first one has the terminal. All others are in process groups of their own, so that Ctrl-C comes
                to each once, from here.
        """
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, (variables, log) in enumerate(zip(environments, logs or [None] * len(environments), strict=True)):
            if foreground and rank == 0:
                self._processes.append(subprocess.Popen(command, env=dict(variables)))
                continue
            with log.open("ab") if log else nullcontext() as stream:
                output: IO[bytes] | None = stream
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=dict(variables),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT if output else None,
                        process_group=0,
                    )
                )

    def exit_code(self) -> int | None:
        """Return the largest exit code once all have ended."""
        codes = [process.poll() for process in self._processes]
        ended = [128 - code if code < 0 else code for code in codes if code is not None]
        return max(ended) if len(ended) == len(codes) else None

    def endings(self) -> list[Ending]:
        """See `Step`."""
        codes = [process.poll() for process in self._processes]
        found = [read_return_code(rank, socket.gethostname(), code) for rank, code in enumerate(codes) if code is not None]
        return [ending for ending in found if ending]

    def signal(self, number: int) -> None:
        """See `Step`."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        """See `Step`."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def watch(
    step: Step,
    signals: Signals,
    grace_s: float = OTHERS_GRACE_S,
    reason_to_end: Callable[[], str | None] = lambda: None,
    poll_s: float = POLL_S,
) -> tuple[list[Ending], str | None]:
    """Wait for the end of processes, and end them if they cannot end well any more.

    Args:
        step: The processes.
        signals: Handed on to them.
        grace_s: How long the others may take after one has died.
        reason_to_end: Asked at every look: why all must be ended now, or None.
        poll_s: How often to look.

    Returns:
        How processes ended by themselves; why the rest was killed, or None.
    """
    died_at: float | None = None
    while step.exit_code() is None:
        while signals.waiting:
            step.signal(signals.waiting.pop(0))
        endings, now = step.endings(), time.monotonic()
        if died_at is None and not _stopped_well(endings):
            died_at = now
        because = reason_to_end()
        if because is None and died_at is not None and now - died_at > grace_s:
            because = f"others did not notice within {grace_s:g} s"
        if because:
            logger.warning("ending the processes: %s", because)
            step.kill()
            return endings, because
        time.sleep(poll_s)
    return step.endings(), None


def launch(command: Sequence[str], count: int, grace_s: float = OTHERS_GRACE_S) -> int:
    """Run a command in several processes that know of each other, and return one exit code for all.

    Signals go on to every process. If one dies, the others are ended after a while, should they not end by themselves.

    Args:
        command: The same for all; rank and size are in its environment, as torchrun puts them there.
        count: How many.
        grace_s: How long the others may take after one has died.

    Returns:
        0 done; 2 wrong input; 75 to be run again: stopped at a safe point, or killed from outside; 130 interrupted;
        1 (or whatever else a process ended with) a fault of ours, whose traceback was printed.
    """
    signals = Signals()
    with signals.noted(), tempfile.TemporaryDirectory(prefix="meddino-said-") as said:
        step = LocalProcesses(command, [{**variables, SAID_FOLDER: said} for variables in _environments(count)])
        endings, because = watch(step, signals, grace_s)
    for ending in endings:
        # Wrong input was said by the process that met it first.
        if ending.exit_code != EXIT_WRONG_INPUT and not _stopped_well([ending]):
            logger.error("process %s of %d: %s", ending.who, count, ending.how)
    return judge(endings, step.exit_code() or 0, because).exit_code


def is_launched(environment: Mapping[str, str]) -> bool:
    """True in a process that this launcher, torchrun or srun has started as one of several."""
    return "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launcher_pid(environment: Mapping[str, str]) -> int | None:
    """Return the process that this one must not outlive; None if nobody launched it as one of several."""
    if LAUNCHER_PID in environment:
        return int(environment[LAUNCHER_PID])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in environment else None


def rank_variables(rank: int, count: int) -> dict[str, str]:
    """Return what tells a process of this machine its place, as torchrun does."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}


def free_port(host: str = "") -> str:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return str(probe.getsockname()[1])


def _environments(count: int) -> Iterator[dict[str, str]]:
    # More threads than cores slow torch many times over.
    threads = str(max(1, usable_cores() // count))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port("127.0.0.1"), LAUNCHER_PID: str(os.getpid())}
    shared = {"OMP_NUM_THREADS": threads, **os.environ, **place}
    for rank in range(count):
        yield {**shared, **rank_variables(rank, count)}


def _stopped_well(endings: Sequence[Ending]) -> bool:
    """Tell whether all that ended did so at a safe point; their peers then do too, and are not to be hurried."""
    return all(ending.exit_code == EXIT_RUN_AGAIN for ending in endings)


@functools.cache
def have_semaphores(workers: int) -> bool:
    """Tell, and say so if not, whether so many workers can be talked to: semaphores lie in /dev/shm, which may be full.

    Args:
        workers: Processes that this one would start with queues to them.
    """
    try:
        held = [multiprocessing.get_context("fork").Lock() for _ in range(_SEMAPHORES + workers * _OF_A_WORKER)]
        del held
    except OSError as error:
        logger.warning(
            "no room for workers in /dev/shm (%s): one process does everything, which is slower; free some there, or give a "
            "container more (docker run --shm-size=8g)",
            error.strerror or error,
        )
        return False
    return True


def end_with(parent: int) -> None:
    """Let the kernel end this process as soon as the one that started it is gone, whatever ended that one.

    SIGKILL leaves a trainer no time to end its workers, and a worker that waits for a full queue or for a disk does not look
    whether anybody still reads. Linux only; elsewhere this does nothing.

    Args:
        parent: The process id of the one that started this process. It may be gone already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def tied(command: Sequence[str]) -> list[str]:
    """Return a command that runs the given one, and that `end_with` ends together with this process.

    Args:
        command: The path of a program, and its arguments.
    """
    # A program of its own: between fork and exec, where `preexec_fn` would do it, a process with threads may not do much.
    begin = f"import os, sys; from {__name__} import end_with; end_with({os.getpid()}); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", begin, *command]
