"""Several processes of one command on this machine: started together, told of signals together, ended together.

torchrun starts processes as well, but whatever they end with, it ends with 1, and it dies of signals that it does not know.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from meddino.core.command import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RUN_AGAIN, EXIT_WRONG_INPUT
from meddino.core.logging import get_logger

LAUNCHER_PID = "MEDDINO_LAUNCHER_PID"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# After one has died: time for the others to notice, to save what they are saving and to end by themselves.
OTHERS_GRACE_S = 30.0
POLL_S = 0.1
logger = get_logger(__name__)


def is_launched(environment: Mapping[str, str]) -> bool:
    """True in a process that this launcher, torchrun or srun has started as one of several."""
    return "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launcher_pid(environment: Mapping[str, str]) -> int | None:
    """Return the process that this one must not outlive; None if nobody launched it as one of several."""
    if LAUNCHER_PID in environment:
        return int(environment[LAUNCHER_PID])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in environment else None


def launch(command: Sequence[str], count: int, grace_s: float = OTHERS_GRACE_S) -> int:
    """Run a command in several processes that know of each other, and return one exit code for all.

    Signals go on to every process. If one dies, the others are ended after a while, should they not end by themselves.

    Args:
        command: The same for all; rank and size are in its environment, as torchrun puts them there.
        count: How many.
        grace_s: How long the others may take after one has died.

    Returns:
        0 done; 2 wrong input; 75 to be run again: stopped at a safe point, or killed from outside; 130 interrupted;
        1 a fault of ours, whose traceback was printed.
    """
    with _noted_signals() as waiting:
        processes = [
            # In process groups of their own: Ctrl-C comes to each once, from here.
            subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, process_group=0)
            for variables in _environments(count)
        ]
        deadline: float | None = None
        while any(process.poll() is None for process in processes):
            while waiting:
                number = waiting.pop(0)
                for process in processes:
                    process.send_signal(number)
            codes = [process.poll() for process in processes]
            if deadline is None and any(code not in (None, EXIT_DONE, EXIT_RUN_AGAIN) for code in codes):
                deadline = time.monotonic() + grace_s
            if deadline is not None and time.monotonic() > deadline:
                logger.warning(
                    "%d processes did not end by themselves within %g s; they are killed", codes.count(None), grace_s
                )
                _kill(processes)
                return exit_code([code for code in codes if code is not None])
            time.sleep(POLL_S)
        return exit_code([process.returncode for process in processes])


def exit_code(codes: Sequence[int]) -> int:
    """Return one exit code for several processes; a negative one is a signal that killed its process.

    One death breaks the connections of the others, so the loudest cause is asked first. Wrong input never mends itself; who
    kills a process from outside (a scheduler, the kernel without memory) may let the next one live.
    """
    for rank, code in enumerate(codes):
        if code not in (EXIT_DONE, EXIT_RUN_AGAIN):
            logger.error(
                "process %d of %d: %s", rank, len(codes), signal.Signals(-code).name if code < 0 else f"ended with {code}"
            )
    if EXIT_WRONG_INPUT in codes:
        return EXIT_WRONG_INPUT
    if EXIT_INTERRUPTED in codes:
        return EXIT_INTERRUPTED
    if any(code < 0 for code in codes):
        return EXIT_RUN_AGAIN
    if any(code not in (EXIT_DONE, EXIT_RUN_AGAIN) for code in codes):
        return 1
    return EXIT_RUN_AGAIN if EXIT_RUN_AGAIN in codes else EXIT_DONE


def _environments(count: int) -> Iterator[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # More threads than cores slow torch many times over.
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        yield {**shared, **place, LAUNCHER_PID: str(os.getpid())}


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {number: signal.signal(number, note) for number in FORWARDED}
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
