"""From a corpus to batches: one decode feeds all views, any step is reached at once, corrupt samples have fallbacks."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from meddino.core.errors import ShardError
from meddino.data.intensity import Modality
from meddino.distributed.collectives import world_size
from meddino.distributed.launcher import have_semaphores
from meddino.distributed.process_group import processes_here
from meddino_pretrain.data.batches import Collate, RawBatch
from meddino_pretrain.data.config import LoaderConfig
from meddino_pretrain.data.crops import cut_crop, draw_boxes, repeated_box
from meddino_pretrain.data.intensities import Intensities, StoredSlice
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.data.workers import (
    ALONE_AFTER_SIGNAL_S,
    TOGETHER_AFTER_SIGNAL_S,
    PackedBatch,
    Sharing,
    WorkerBatches,
    choose_sharing,
    packed,
)

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
        repeat_crop: Share of the sides that a repeated slice is cut to; None: it stays whole.
    """

    corpus: SliceSource
    spec: ViewSpec
    collate: Collate
    intensities: Intensities
    order: SampleOrder
    share: BatchShare
    repeat_crop: tuple[float, float] | None = None

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
            if self.repeat_crop is not None and self.order.is_repeat(number):
                values = values[repeated_box(self.repeat_crop, seed, number, values.shape)]
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

    def batch_bytes(self) -> int:
        """Return the size of the largest micro-batch, without the little that a method adds."""
        count = len(self.share.samples(0))
        choices = [
            [self.intensities.empty(view.count, count, sizes.px[name]).nbytes for name, view in self.spec.views.items()]
            for sizes in self.spec.sizes
        ]
        return max(sum(views) for views in choices)

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


class _Batches(Dataset[PackedBatch | ShardError]):
    """Micro-batches as items of a dataset, for DataLoader's workers."""

    def __init__(self, maker: SampleMaker, sharing: Sharing) -> None:
        self.maker, self.sharing = maker, sharing

    def __getitem__(self, number: tuple[int, int]) -> PackedBatch | ShardError:
        try:
            return packed(self.maker.make(*number), self.sharing)
        except ShardError as error:
            # As a value: DataLoader would hide the one clear line behind the worker's traceback.
            return error


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


@dataclass
class Loader:
    """Iterates over the raw micro-batches of the steps `first_step` to `last_step` - 1, in order.

    Attributes:
        maker: Makes the batches.
        config: Workers, prefetch.
        first_step: Where to begin; reached without reading what comes before.
        last_step: Where to end (not included).
        pin_memory: Whether batches go to an accelerator.
        stopped: Whether a signal asks the run to stop: a batch that does not come is not waited for then.
    """

    maker: SampleMaker
    config: LoaderConfig
    first_step: int
    last_step: int
    pin_memory: bool = False
    stopped: Callable[[], bool] = lambda: False

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield micro-batches; each says how long it was waited for.

        Raises:
            ShardError: A sample has no readable slice, nor a fallback.
            WorkersLost: A worker was killed, or hangs.
        """
        wanted = _MicroBatches(self.first_step, self.last_step, self.maker.share.accumulation)
        workers = min(self.config.workers, len(wanted))
        helped = self._helped(wanted, workers) if workers and have_semaphores(workers) else None
        try:
            for number in wanted:
                start = time.perf_counter()
                item: RawBatch | ShardError = self.maker.make(*number) if helped is None else helped.next()
                if isinstance(item, ShardError):
                    raise item
                yield replace(item, data_wait_s=time.perf_counter() - start)
        finally:
            if helped is not None:
                helped.close()

    def _helped(self, wanted: _MicroBatches, workers: int) -> WorkerBatches:
        # What workers hold ready, what the wait holds, and a step's micro-batches.
        held = workers * self.config.prefetch + 1 + self.maker.share.accumulation
        return WorkerBatches(
            _Batches(self.maker, choose_sharing(self.maker.batch_bytes(), held, processes_here(os.environ))),
            wanted,
            workers=workers,
            prefetch=self.config.prefetch,
            pin_memory=self.pin_memory,
            stopped=self.stopped,
            after_signal_s=ALONE_AFTER_SIGNAL_S if world_size() == 1 else TOGETHER_AFTER_SIGNAL_S,
        )
