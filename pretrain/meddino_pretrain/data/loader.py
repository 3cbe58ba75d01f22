"""From a corpus to batches: one decode feeds all crops, any step is reached at once, damaged slices are stood in for."""

import atexit
import itertools
import multiprocessing
import os
import signal
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from meddino.core.errors import ShardError, StoppedEarly
from meddino.core.process import end_with
from meddino.data.intensity import Modality
from meddino_pretrain.data.batches import RawBatch
from meddino_pretrain.data.config import CropsConfig, LoaderConfig
from meddino_pretrain.data.crops import GLOBAL_CROPS, crop_sizes_for_step, cut_crop, draw_boxes
from meddino_pretrain.data.intensities import COLUMNS, Intensities, StoredSlice
from meddino_pretrain.data.packed_batches import PackedBatch, packed
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.methods.dinov3.config import MaskingConfig
from meddino_pretrain.methods.dinov3.masking import masks_for_crops

# Slices tried for one place of a batch: where so many drawn at random are damaged, the rest is too.
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
        """Return a slice's stored values [rows, cols] or [rows, cols, 3]; ShardError if it is damaged."""
        ...


@dataclass(frozen=True)
class SampleMaker:
    """Makes raw batches; the same object serves the training process and its workers.

    Attributes:
        corpus: Where slices are read.
        crops: How they are cropped.
        masking: How global crops are masked.
        intensities: How they become model input.
        patch_size: Side of a patch [px].
        order: Which slice comes when.
        share: Which places of a step are this rank's.
    """

    corpus: SliceSource
    crops: CropsConfig
    masking: MaskingConfig
    intensities: Intensities
    patch_size: int
    order: SampleOrder
    share: BatchShare

    def make(self, step: int, micro_step: int) -> RawBatch:
        """Read, crop and mask one micro-batch: a pure function of the seed, the step and the places.

        Raises:
            ShardError: A place found no readable slice, nor a stand-in for it.
        """
        seed, sizes = self.order.seed, crop_sizes_for_step(self.crops, self.order.seed, step)
        places = self.share.places(micro_step)
        batch, num_local = len(places), self.crops.num_local
        global_stored = self.intensities.empty(GLOBAL_CROPS, batch, sizes.global_px)
        local_stored = self.intensities.empty(num_local, batch, sizes.local_px)
        gram_stored = None if sizes.gram_px is None else self.intensities.empty(GLOBAL_CROPS, batch, sizes.gram_px)
        intensity = np.empty((GLOBAL_CROPS + num_local, batch, COLUMNS), dtype=np.float32)
        on_host = self.intensities.on_host
        keys: list[str] = []
        damaged: list[tuple[str, str]] = []
        for i, number in enumerate(self.order.numbers(step, places)):
            index, values, complaints = self._read(number)
            keys.append(self.corpus.key(index))
            damaged += [(self.corpus.key(bad), wrong) for bad, wrong in complaints.items()]
            y_mm, x_mm = self.corpus.spacing_mm[index].tolist()
            stored = StoredSlice(values, self.corpus.modality(index), self.corpus.value_range(index))
            boxes = draw_boxes(self.crops, seed, number, values.shape[:2], (y_mm, x_mm))
            distorted = self.intensities.distort(stored, seed, number)
            for crop, box in enumerate(boxes):
                if crop >= GLOBAL_CROPS:
                    local_stored[crop - GLOBAL_CROPS, i] = on_host(cut_crop(distorted, box, sizes.local_px))
                    continue
                global_stored[crop, i] = on_host(cut_crop(distorted, box, sizes.global_px))
                if gram_stored is not None and sizes.gram_px is not None:
                    gram_stored[crop, i] = on_host(cut_crop(values, box, sizes.gram_px))
            intensity[:, i] = self.intensities.draw(stored, seed, number, len(boxes))
        side = sizes.global_px // self.patch_size
        masks = masks_for_crops(self.masking, seed, step, self.order.global_batch, places, (side, side), GLOBAL_CROPS)
        indices, weights = _mask_places(masks)
        return RawBatch(
            step=step,
            micro_step=micro_step,
            sizes=sizes,
            global_stored=global_stored.flatten(0, 1),
            local_stored=local_stored.flatten(0, 1),
            gram_stored=None if gram_stored is None else gram_stored.flatten(0, 1),
            global_intensity=torch.from_numpy(intensity[:GLOBAL_CROPS]).flatten(0, 1),
            local_intensity=torch.from_numpy(intensity[GLOBAL_CROPS:]).flatten(0, 1),
            masks=torch.from_numpy(masks),
            mask_indices=indices,
            mask_weights=weights,
            keys=keys,
            damaged=damaged,
        )

    def _read(self, number: int) -> tuple[int, NDArray[Any], dict[int, str]]:
        complaints: dict[int, str] = {}
        for index in itertools.chain([self.order.slice_of(number)], self.order.stand_ins(number)):
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

    def __getitem__(self, place: tuple[int, int]) -> RawBatch | PackedBatch | ShardError:
        try:
            batch = self.maker.make(*place)
        except ShardError as error:
            # As a value: DataLoader would hide the one clear line behind the worker's traceback.
            return error
        return batch if get_worker_info() is None else packed(batch)


@dataclass(frozen=True)
class _Places:
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
        return len(_Places(self.first_step, self.last_step, self.maker.share.accumulation))

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield micro-batches; each says how long it was waited for.

        Raises:
            ShardError: A place found no readable slice, nor a stand-in for it.
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
        places = _Places(self.first_step, self.last_step, self.maker.share.accumulation)
        batches = _Batches(self.maker)
        workers = min(self.config.workers, len(places))
        if not workers:
            return (batches[place] for place in places)
        before = set(multiprocessing.active_children())
        iterator = iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=places,
                num_workers=workers,
                prefetch_factor=self.config.prefetch,
                pin_memory=self.pin_memory,
                worker_init_fn=partial(_begin_worker, trainer=os.getpid()),
            )
        )
        for worker in set(multiprocessing.active_children()) - before:
            atexit.register(_end_worker, worker)
        return iterator


def build_loader(
    corpus: SliceSource,
    crops: CropsConfig,
    masking: MaskingConfig,
    intensities: Intensities,
    loader: LoaderConfig,
    *,
    patch_size: int,
    seed: int,
    global_batch: int,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Make the loader of one stage on one rank.

    Args:
        corpus: Where slices are read.
        crops: How they are cropped.
        masking: How global crops are masked.
        intensities: How they become model input.
        loader: Workers, prefetch.
        patch_size: Side of a patch [px].
        seed: The stage's seed; another stage takes another, or it sees the same slices in the same order.
        global_batch: Slices in one optimizer step, over all ranks and micro-batches.
        first_step: First step to yield.
        last_step: First step not to yield.
        rank: This process's number.
        world_size: Number of processes.
        accumulation: Micro-batches in which each rank computes one step.
        pin_memory: Whether batches go to an accelerator.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches, or a crop not into patches.
    """
    crops.check_patch_size(patch_size)
    maker = SampleMaker(
        corpus=corpus,
        crops=crops,
        masking=masking,
        intensities=intensities,
        patch_size=patch_size,
        order=SampleOrder(seed, len(corpus), global_batch),
        share=BatchShare(global_batch, rank, world_size, accumulation),
    )
    return Loader(maker, loader, first_step, last_step, pin_memory)


def _mask_places(masks: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    indices = np.flatnonzero(masks)
    counts = masks.sum(axis=1)
    weights = (1.0 / np.maximum(counts, 1)).astype(np.float32)[indices // masks.shape[1]]
    return torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(weights)
