"""From a corpus to batches: one decode feeds all views, any step is reached at once, corrupt samples have fallbacks."""

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from meddino.core.errors import ShardError, StoppedEarly
from meddino.core.process import end_with
from meddino.data.intensity import Modality
from meddino_pretrain.data.batches import Collate, RawBatch
from meddino_pretrain.data.config import LoaderConfig
from meddino_pretrain.data.crops import cut_crop, draw_boxes
from meddino_pretrain.data.intensities import Intensities, StoredSlice
from meddino_pretrain.data.packed_batches import PackedBatch, packed
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.data.views import ViewSpec

# Slices tried for one sample: where so many drawn at random are corrupt, the rest is too.
MAX_TRIED = 100


@runtime_checkable
class SliceSource(Protocol):
    """What the loader needs of a corpus; `meddino.data.corpus.Corpus` is one."""

    @property
    def root(self) -> Path:
        """Its folder, for messages."""
        ...

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """[slices, 2]: spacing (y, x) of every slice."""
        ...

    def __len__(self) -> int:
        """Return the number of slices."""
        ...

    def key(self, index: int) -> str:
        """Return the key of a slice."""
        ...

    def modality(self, index: int) -> Modality:
        """Return what a slice's values mean."""
        ...

    def value_range(self, index: int) -> tuple[float, float] | None:
        """Return the values that become 0 and 1; None for CT."""
        ...

    def read(self, index: int) -> NDArray[Any]:
        """Return a slice's stored values [rows, cols] or [rows, cols, 3]; ShardError if it is corrupt."""
        ...


@dataclass(frozen=True)
class SampleMaker:
    """Makes raw batches; the same object serves the training process and its workers.

    Attributes:
        corpus: Where slices are read.
        spec: Which views of them are made.
        collate: What the method adds to a batch.
        intensities: How they become model input.
        order: Which slice comes when.
        share: Which samples of a step are this rank's.
    """

    corpus: SliceSource
    spec: ViewSpec
    collate: Collate
    intensities: Intensities
    order: SampleOrder
    share: BatchShare

    def make(self, step: int, micro_step: int) -> RawBatch:
        """Read one micro-batch and cut its views: a pure function of the seed, the step and the samples.

        Raises:
            ShardError: A sample has no readable slice, nor a fallback.
        """
        seed, sides = self.order.seed, self.spec.sizes_for_step(self.order.seed, step)
        samples = self.share.samples(micro_step)
        views = {name: self.intensities.empty(view.count, len(samples), sides[name]) for name, view in self.spec.views.items()}
        boxes = {name: np.empty((*cut.shape[:2], 7), dtype=np.int32) for name, cut in views.items()}
        drawn: list[NDArray[np.float32]] = []
        keys: list[str] = []
        corrupt: list[tuple[str, str]] = []
        for i, number in enumerate(self.order.numbers(step, samples)):
            index, values, complaints = self._read(number)
            keys.append(self.corpus.key(index))
            corrupt += [(self.corpus.key(bad), wrong) for bad, wrong in complaints.items()]
            y_mm, x_mm = self.corpus.spacing_mm[index].tolist()
            stored = StoredSlice(values, self.corpus.modality(index), self.corpus.value_range(index))
            found = draw_boxes(self.spec, seed, number, values.shape[:2], (y_mm, x_mm))
            distorted = self.intensities.distort(stored, seed, number)
            for name, view in self.spec.views.items():
                source = distorted if view.augmented else values
                for row, box in enumerate(found[name]):
                    views[name][row, i] = self.intensities.on_host(cut_crop(source, box, sides[name]))
                    boxes[name][row, i] = (*box, *values.shape[:2])
            count = sum(view.count for view in self.spec.drawn.values())
            drawn.append(self.intensities.draw(stored, seed, number, count))
        rows = torch.from_numpy(np.stack(drawn, axis=1))
        raw = RawBatch(
            step=step,
            micro_step=micro_step,
            samples=samples,
            views={name: cut.flatten(0, 1) for name, cut in views.items()},
            intensity={name: rows[self.spec.rows_of(name)].flatten(0, 1) for name in self.spec.views},
            keys=keys,
            boxes={name: torch.from_numpy(each).flatten(0, 1) for name, each in boxes.items() if self.spec.with_boxes},
            corrupt=corrupt,
        )
        return self.collate(raw, self.order)

    def _read(self, number: int) -> tuple[int, NDArray[Any], dict[int, str]]:
        complaints: dict[int, str] = {}
        for index in itertools.chain([self.order.slice_of(number)], self.order.fallbacks(number)):
            if index in complaints:
                continue
            try:
                return index, self.corpus.read(index), complaints
            except ShardError as error:
                complaints[index] = str(error)
            if len(complaints) == MAX_TRIED:
                break
        raise ShardError(
            f"none of {len(complaints)} slices tried in corpus {self.corpus.root} can be read; "
            f"the last one: {list(complaints.values())[-1]}"
        )


class _Batches(Dataset[RawBatch | PackedBatch | ShardError]):
    """Micro-batches as items of a dataset, for DataLoader's workers."""

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker

    def __getitem__(self, number: tuple[int, int]) -> RawBatch | PackedBatch | ShardError:
        try:
            batch = self.maker.make(*number)
        except ShardError as error:
            # As a value: DataLoader would hide the one clear line behind the worker's traceback.
            return error
        return batch if get_worker_info() is None else packed(batch)


@dataclass(frozen=True)
class _MicroBatches:
    """(step, micro-step) of every micro-batch in order; never a list, for a run has a million of them."""

    first_step: int
    last_step: int
    accumulation: int

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.product(range(self.first_step, self.last_step), range(self.accumulation))


def _begin_worker(worker: int, trainer: int) -> None:
    end_with(trainer)
    # A scheduler signals every process of a job. The trainer answers by finishing its step and saving, for which it needs its
    # workers; they end when it ends. torch's worker loop would die of SIGTERM and take the trainer along.
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _only_the_second_one_counts)
    signal.signal(signal.SIGQUIT, _end_at_once)


def _only_the_second_one_counts(number: int, frame: object) -> None:
    # The scheduler's is the first; torch sends another to a worker that does not end.
    signal.signal(signal.SIGTERM, _end_at_once)


def _end_at_once(number: int, frame: object) -> None:
    os._exit(0)


def _end_worker(worker: BaseProcess) -> None:
    # Python, as it ends, sends each worker one SIGTERM and waits; a worker whose iterator still stands would ignore it.
    if worker.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGQUIT)


def _received(source: Iterator[Any]) -> Any:
    """Return the next item of a source, None at its end.

    Raises:
        StoppedEarly: A worker was killed from outside, as by the kernel without memory.
    """
    try:
        item = next(source, None)
        return item.unpack() if isinstance(item, PackedBatch) else item
    except (RuntimeError, ConnectionError, EOFError) as error:
        # torch says so of dead workers; what a worker itself has raised begins otherwise and is a fault of ours.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoppedEarly(
            f"a worker of the loader was killed ({first}): often the machine's memory is full, then lower loader.workers or "
            "loader.prefetch; the same command again goes on from the last checkpoint"
        ) from error


@dataclass
class Loader:
    """Iterates over the raw micro-batches of the steps `first_step` to `last_step` - 1, in order.

    Attributes:
        maker: Makes the batches.
        config: Workers, prefetch.
        first_step: Where to begin; reached without reading what comes before.
        last_step: Where to end (not included).
        pin_memory: Whether batches go to an accelerator.
    """

    maker: SampleMaker
    config: LoaderConfig
    first_step: int
    last_step: int
    pin_memory: bool = False

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(_MicroBatches(self.first_step, self.last_step, self.maker.share.accumulation))

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield micro-batches; each says how long it was waited for.

        Raises:
            ShardError: A sample has no readable slice, nor a fallback.
            StoppedEarly: A worker was killed.
        """
        source = self._source()
        while True:
            start = time.perf_counter()
            item = _received(source)
            if item is None:
                return
            if isinstance(item, ShardError):
                del source  # ends the workers now, not whenever the error's traceback is collected
                raise item
            yield replace(item, data_wait_s=time.perf_counter() - start)

    def _source(self) -> Any:
        wanted = _MicroBatches(self.first_step, self.last_step, self.maker.share.accumulation)
        batches = _Batches(self.maker)
        workers = min(self.config.workers, len(wanted))
        if not workers:
            return (batches[number] for number in wanted)
        before = set(multiprocessing.active_children())
        iterator = iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=wanted,
                num_workers=workers,
                prefetch_factor=self.config.prefetch,
                pin_memory=self.pin_memory,
                worker_init_fn=partial(_begin_worker, trainer=os.getpid()),
            )
        )
        # torch's handler raises of a dead worker wherever the trainer is, in the midst of a step; `_received` is told in time.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in set(multiprocessing.active_children()) - before:
            atexit.register(_end_worker, worker)
        return iterator
