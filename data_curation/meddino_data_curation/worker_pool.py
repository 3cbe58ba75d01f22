"""Volumes over processes. A process that dies takes nothing with it but the volume it was reading."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from meddino.core.command import usable_cores
from meddino.core.errors import VolumeError
from meddino.distributed.launcher import have_semaphores
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.work_folder import WorkFolder
from meddino_data_curation.selection.volume_job import VolumeJob, curate_volume, record_crash

_QUEUED_PER_WORKER = 3
_ITEMS_AT_ONCE = 200

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(config: CurationConfig) -> int:
    """Return how many processes a curation takes: one where there is no room for what several talk through."""
    wanted = config.workers or usable_cores()
    return wanted if wanted == 1 or have_semaphores(wanted) else 1


def run_volumes(
    jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, workers: int, on_done: Callable[[str], None]
) -> None:
    """Do all volumes; what becomes of them does not depend on the number of workers.

    Args:
        jobs: In the order in which they are begun.
        config: The curation.
        corpus: Its work folder gets the results.
        workers: Processes; 1 works in this one.
        on_done: Is told each volume's status. What it raises stops the run.

    Raises:
        OSError: A full disk.
    """
    if workers == 1:
        _limit_threads()
        for job in jobs:
            on_done(curate_volume(job, config, WorkFolder(corpus)))
        return
    remaining = list(jobs)
    while remaining:
        interrupted, remaining = _run_pool(remaining, config, corpus, workers, on_done)
        # A process died. Each volume that was then under way is tried alone, so that the guilty one is known.
        for job in interrupted:
            if _run_pool([job], config, corpus, 1, on_done)[0]:
                record_crash(job, WorkFolder(corpus))
                on_done("rejected")


def in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Apply a function to every item and yield the results in their order.

    Raises:
        VolumeError: The system ended a process.
    """
    if workers == 1:
        yield from map(function, items)
        return
    try:
        with ProcessPoolExecutor(workers, _server()) as pool:
            yield from pool.map(function, items, chunksize=_ITEMS_AT_ONCE)
    except BrokenProcessPool as error:
        raise VolumeError("a process was ended while it read headers (not enough memory?); try fewer `workers`") from error


def _server() -> ForkServerContext:
    """Return what starts processes: forks of a server that has imported everything and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meddino_data_curation.selection.volume_job"])
    return context


def _run_pool(
    jobs: Sequence[VolumeJob], config: CurationConfig, corpus: Path, workers: int, on_done: Callable[[str], None]
) -> tuple[list[VolumeJob], list[VolumeJob]]:
    """Run jobs in one pool; if a process dies, return the jobs that were under way and those not yet begun."""
    waiting: Iterator[VolumeJob] = iter(jobs)
    running: dict[Future[str], VolumeJob] = {}
    pool = ProcessPoolExecutor(workers, _server(), _start_worker, (config, corpus))
    try:
        while True:
            while len(running) < _QUEUED_PER_WORKER * workers and (job := next(waiting, None)) is not None:
                future = pool.submit(_work, job)
                running[future] = job
            if not running:
                return [], []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                status = future.result()
                del running[future]
                on_done(status)
    except BrokenProcessPool:
        return list(running.values()), list(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_told: dict[str, Any] = {}  # what a worker process is told once, at its start


def _start_worker(config: CurationConfig, corpus: Path) -> None:
    _told.update(config=config, work=WorkFolder(corpus))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger().setLevel(logging.WARNING)
    _limit_threads()


def _die_with_parent() -> None:
    """End this process when the one that started it is gone: it would go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _limit_threads() -> None:
    from meddino.volumes.native import use_one_thread

    use_one_thread()


def _work(job: VolumeJob) -> str:
    return curate_volume(job, _told["config"], _told["work"])
