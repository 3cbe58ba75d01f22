"""Processes that make batches: how they hand them over, how they end, and a wait for them that always ends.

torch's own wait is for one kind of trouble, a process that is seen to die. It is deaf to one that lives and gives nothing (a
disk or network that hangs), to one that was killed in the midst of a message, whose rest is then read for ever, and to the
signals that a scheduler sends meanwhile. So a thread takes the batches, and the training process only looks at what it has.
"""

import atexit
import errno
import math
import multiprocessing
import os
import pickle
import queue
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from meddino.core.command import STOP_SIGNALS
from meddino.core.errors import MedDINOError, StoppedEarly
from meddino.core.logging import get_logger
from meddino.distributed.launcher import end_with
from meddino_pretrain.data.batches import RawBatch

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.5
# How long workers may take for a batch after a signal: alone, where every step so far is saved without it, and together, where
# all processes save only after a step that all have taken (schedulers kill after 30 s).
ALONE_AFTER_SIGNAL_S, TOGETHER_AFTER_SIGNAL_S = 5.0, 25.0
TOLD_AFTER_S = 60.0
GIVEN_UP_AFTER_S = 1800.0
# Tensors of a batch, each of which is an open file, and what else a process has open: shards, pipes, libraries.
FILES_OF_A_BATCH, OTHER_FILES = 16, 200
Sharing = Literal["descriptors", "names", "values"]
logger = get_logger(__name__)


class WorkersLost(StoppedEarly):
    """No batch comes any more: a worker was killed, or hangs. The training state is that after the last step."""


class WorkerBatches:
    """The items of a data set in order, made by processes; `next` never waits without looking at them."""

    def __init__(
        self,
        dataset: Dataset[Any],
        wanted: Iterable[Any],
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        stopped: Callable[[], bool],
        after_signal_s: float,
    ) -> None:
        """Start the processes.

        Args:
            dataset: Makes an item of each of what is wanted.
            wanted: In this order.
            workers: Processes.
            prefetch: Items that each holds ready.
            pin_memory: Whether items go to an accelerator.
            stopped: Whether a signal asks the run to stop.
            after_signal_s: How long an item is waited for then.
        """
        before = set(multiprocessing.active_children())
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=wanted,
            num_workers=workers,
            prefetch_factor=prefetch,
            pin_memory=pin_memory,
            worker_init_fn=partial(_begin_worker, trainer=os.getpid()),
        )
        iterator = iter(loader)
        # torch's handler raises of a dead worker wherever the trainer is, in the midst of a step; it is seen here in time.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.workers = tuple(set(multiprocessing.active_children()) - before)
        for worker in self.workers:
            atexit.register(end_worker, worker)
        self._stopped, self._after_signal_s = stopped, after_signal_s
        self._received, self._closed = queue.Queue[Any](1), threading.Event()
        self._thread = threading.Thread(target=_receive, args=(iterator, self._received, self._closed), daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """Return the next item; nobody may ask for more than was wanted.

        Raises:
            WorkersLost: A worker was killed, or none gave anything for long, or not even soon after a signal.
            MedDINOError: Too many files are open.
        """
        begun, told_s, stopped_at = time.monotonic(), TOLD_AFTER_S, math.inf
        while True:
            dead = self._dead()
            try:
                item = self._received.get(timeout=POLL_S)
            except queue.Empty:
                now = time.monotonic()
                stopped_at = min(stopped_at, now) if self._stopped() else stopped_at
                self._check(dead, now - begun, now - stopped_at)
                if now - begun >= told_s:
                    told_s *= 2
                    logger.warning(
                        "no batch for %.0f s though all %d workers of the loader live: does a disk or the network hang?",
                        now - begun,
                        len(self.workers),
                    )
                continue
            if isinstance(item, Exception):
                self._explain(item)
            return item

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._closed.set()
        for worker in self.workers:
            end_worker(worker)
        with suppress(queue.Empty):
            self._received.get_nowait()  # the thread may wait for its place
        self._thread.join(timeout=1)

    def _dead(self) -> str:
        return next((f"process {one.pid} ended with {one.exitcode}" for one in self.workers if one.exitcode is not None), "")

    def _check(self, dead: str, silent_s: float, stopped_s: float) -> None:
        if dead:
            raise _killed(dead)
        if stopped_s >= self._after_signal_s:
            raise WorkersLost(
                f"stopped by a signal while the loader's workers gave no batch for {silent_s:.0f} s; the same command again "
                "goes on from the last checkpoint"
            )
        if silent_s >= GIVEN_UP_AFTER_S:
            raise WorkersLost(
                f"the loader's workers live and gave no batch for {silent_s:.0f} s: does a disk or the network hang? The same "
                "command again goes on from the last checkpoint"
            )

    def _explain(self, error: Exception) -> NoReturn:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        # torch says so of dead workers; what a worker itself has raised begins otherwise and is a fault of ours.
        if self._dead() or first.startswith("DataLoader worker") or isinstance(error, ConnectionError | EOFError):
            raise _killed(self._dead() or first) from error
        if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in first:
            raise MedDINOError(f"too many files are open ({first}): ulimit -n 65536, or lower loader.prefetch") from error
        raise error


def _killed(how: str) -> WorkersLost:
    return WorkersLost(
        f"a worker of the loader was killed ({how}): often the machine's memory is full, then lower loader.workers or "
        "loader.prefetch; the same command again goes on from the last checkpoint"
    )


def _receive(source: Iterator[Any], received: queue.Queue[Any], closed: threading.Event) -> None:
    """Take items until there is none, or an error; what it waits for here nobody else waits for."""
    item: Any = None
    while not closed.is_set() and not isinstance(item, Exception):
        try:
            item = next(source)
            item = item.unpack() if isinstance(item, PackedBatch) else item
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - raised again where the item is waited for
            item = error
        received.put(item)


def _begin_worker(worker: int, trainer: int) -> None:
    end_with(trainer)
    # A scheduler signals every process of a job. The trainer answers by finishing its step and saving, for which it needs its
    # workers; they end when it ends. torch's worker loop would die of SIGTERM and take the trainer along.
    for name in {signal.SIGINT, *STOP_SIGNALS} - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _only_the_second_one_counts)


def _only_the_second_one_counts(number: int, frame: object) -> None:
    # The scheduler's is the first; torch sends another to a worker that does not end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_worker(worker: BaseProcess) -> None:
    """End a worker at once. Python, as it ends, sends each one SIGTERM and waits; one that hangs would not hear it."""
    if worker.is_alive():
        worker.kill()
        worker.join(timeout=1)


def choose_sharing(batch_bytes: int, batches: int, processes: int) -> Sharing:
    """Return how workers can hand their batches over, and say so where it is not the fastest way.

    Args:
        batch_bytes: Of one batch.
        batches: That each training process and its workers hold at a time.
        processes: Training processes of this machine.

    Returns:
        "descriptors": through shared memory; "names": so too, but no file stays open; "values": through pipes.
    """
    needed, free = batch_bytes * batches * processes, _free_shared_memory()
    if needed > free:
        _tell(f"the loader needs {_mib(needed)} of {SHARED_MEMORY} and {_mib(free)} are free")
        return "values"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < batches * FILES_OF_A_BATCH + OTHER_FILES:
        logger.warning(
            "only %d open files are allowed: batches are shared by name, which leaves them in %s if all is killed at once; "
            "better: ulimit -n 65536",
            files,
            SHARED_MEMORY,
        )
        return "names"
    return "descriptors"


def _free_shared_memory() -> float:
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class PackedBatch:
    """A batch as bytes: of where it lies in shared memory, or of all that it holds.

    torch would share it in a thread of the worker's queue, where a full /dev/shm or too few file descriptors lose the batch.
    Packed here, in the worker itself, the fault is seen and the batch goes by value.
    """

    content: bytes

    def unpack(self) -> RawBatch:
        """Return the batch."""
        batch: RawBatch = pickle.loads(self.content)  # noqa: S301 - of our own worker
        return batch

    def pin_memory(self) -> RawBatch:
        """Return the batch in page-locked memory; DataLoader calls this where there is an accelerator."""
        return self.unpack().pin_memory()


def packed(batch: RawBatch, sharing: Sharing) -> PackedBatch:
    """Pack a batch in a worker; by value too where sharing fails."""
    if sharing != "values":
        strategy = "file_system" if sharing == "names" else "file_descriptor"
        torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
        try:
            return PackedBatch(bytes(ForkingPickler.dumps(batch)))
        except (RuntimeError, OSError) as error:
            _tell_once(error)
    return PackedBatch(pickle.dumps(batch))


_told: list[int] = []


def _tell_once(error: Exception) -> None:
    worker = get_worker_info()
    if _told or (worker is not None and worker.id):
        return
    _told.append(1)
    _tell(f"shared memory cannot take them ({str(error).splitlines()[0][:200]})")


def _tell(why: str) -> None:
    logger.warning(
        "batches go through pipes, which is slower: %s; give the container more (docker run --shm-size=8g), more open files "
        "(ulimit -n 65536), or set loader.workers or loader.prefetch lower",
        why,
    )
