"""Batches are pure functions of seed, step and place."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from meddino_pretrain.build import build_loader
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data import workers as worker_processes
from meddino_pretrain.data.batches import RawBatch, to_model_input
from meddino_pretrain.data.config import LoaderConfig
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.loader import Loader, SampleMaker
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.data.workers import WorkersLost, choose_sharing, end_worker
from meddino_pretrain.methods.dinov3.config import CropsConfig, CropSizes, MaskingConfig
from meddino_pretrain.methods.dinov3.views import add_masks, crop_views

from meddino.core.config import load_config
from meddino.core.device import find_machine
from meddino.core.errors import ConfigError, ShardError
from meddino.core.logging import setup_logging
from meddino.data.corpus import Corpus
from meddino.data.intensity import CTIntensity
from tests.data.tiny_corpus import write_corpus
from tests.pretrain.conftest import disc_slice

CONTRACT = CTIntensity()
INTENSITIES = Intensities((CONTRACT,))
CROPS = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16, gram_px=64),), num_local=3)
MIXED = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16), CropSizes(global_px=48, local_px=16, weight=2.0)), num_local=2)


def loader_of(
    corpus, crops=CROPS, workers=0, masking=None, seed=7, first_step=0, last_step=3, rank=0, world_size=1, accumulation=1
) -> Loader:
    maker = SampleMaker(
        corpus=corpus,
        spec=crops if isinstance(crops, ViewSpec) else crop_views(crops),
        collate=partial(add_masks, masking or MaskingConfig(), 8),
        intensities=INTENSITIES,
        order=SampleOrder(seed, len(corpus), 8),
        share=BatchShare(8, rank, world_size, accumulation),
    )
    return Loader(maker, LoaderConfig(workers=workers), first_step, last_step)


def tensors_of(batch: RawBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by the name of its field and its own."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {f"{name}.{key}": each for name, part in parts.items() if isinstance(part, dict) for key, each in part.items()}


def assert_equal(one: RawBatch, other: RawBatch) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rest = {"views": {}, "intensity": {}, "boxes": {}, "extras": {}, "data_wait_s": 0.0}
    assert replace(one, **rest) == replace(other, **rest)


def by_sample(batches: list[RawBatch], name: str, whole: RawBatch) -> torch.Tensor:
    """Put micro-batches (crop-major each) together into one crop-major batch."""
    views = len(tensors_of(whole)[name]) // len(whole.keys)
    return torch.cat([tensors_of(b)[name].unflatten(0, (views, -1)) for b in batches], dim=1).flatten(0, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader__workers_change_nothing(make_corpus, workers):
    corpus = make_corpus()
    alone, helped = list(loader_of(corpus)), list(loader_of(corpus, workers=workers))
    assert len(alone) == len(helped) == 3
    for one, other in zip(alone, helped, strict=True):
        assert_equal(one, other)


def test_loader__without_room_in_shared_memory_batches_go_by_value(make_corpus, monkeypatch, capfd):
    corpus = make_corpus()
    alone = list(loader_of(corpus))

    def full(storage):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # workers are forks: they inherit it
    setup_logging()
    for one, other in zip(alone, loader_of(corpus, workers=2), strict=True):
        assert_equal(one, other)
    told = capfd.readouterr().err
    assert told.count("--shm-size") == 1
    assert "No space left" in told


def test_loader__a_killed_worker_ends_the_wait(make_corpus):
    before = set(multiprocessing.active_children())
    batches = iter(loader_of(make_corpus(count=8), workers=1, last_step=50))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(WorkersLost, match="worker of the loader was killed"):
        list(batches)
    assert time.monotonic() - begun < 4  # torch looks every five seconds


def test_loader__a_worker_that_hangs_is_told_of_and_left_after_a_signal(make_corpus, monkeypatch, caplog):
    monkeypatch.setattr(worker_processes, "POLL_S", 0.02)
    monkeypatch.setattr(worker_processes, "TOLD_AFTER_S", 0.1)
    monkeypatch.setattr("meddino_pretrain.data.loader.ALONE_AFTER_SIGNAL_S", 0.3)
    before, stopped = set(multiprocessing.active_children()), []
    loader = loader_of(make_corpus(count=8), workers=2, last_step=50)
    loader.stopped = lambda: bool(stopped)
    batches = iter(loader)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)  # as one that waits for a disk: it lives, and hears nothing

    class Heard(logging.Handler):
        def emit(self, record):
            stopped.append(record)

    logging.getLogger(worker_processes.__name__).addHandler(heard := Heard())
    try:
        with pytest.raises(WorkersLost, match="stopped by a signal while the loader"):
            list(batches)  # first the batches that were ready, then silence, which is told, then the signal
    finally:
        logging.getLogger(worker_processes.__name__).removeHandler(heard)
    assert "no batch for" in caplog.text
    assert not any(worker.is_alive() for worker in workers)  # SIGTERM, as torch sends it, would wait for ever


def test_loader__workers_that_hang_for_long_are_given_up(make_corpus, monkeypatch):
    monkeypatch.setattr(worker_processes, "POLL_S", 0.02)
    monkeypatch.setattr(worker_processes, "GIVEN_UP_AFTER_S", 0.3)
    loader = loader_of(make_corpus(count=8), workers=1)
    monkeypatch.setattr(Corpus, "read", lambda corpus, index: time.sleep(600))  # workers are forks: they inherit it
    with pytest.raises(WorkersLost, match=r"live and gave no batch for 0 s"):
        next(iter(loader))


def test_loader__a_worker_killed_within_a_message_ends_the_wait(make_corpus, monkeypatch):
    before = set(multiprocessing.active_children())
    batches = iter(loader_of(make_corpus(count=8), workers=1, last_step=50))
    next(batches)
    # Larger than a pipe holds, as a batch by value is: the rest never comes, and reading it never ends.
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", lambda *_: threading.Event().wait())
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(WorkersLost, match="was killed"):
        list(batches)


def test_choose_sharing__asks_for_room_and_names_the_remedy(monkeypatch, caplog):
    monkeypatch.setattr(worker_processes, "_free_shared_memory", lambda: 64 << 20)
    assert choose_sharing(1 << 20, 64, processes=1) == "descriptors"
    assert choose_sharing(1 << 20, 33, processes=2) == "values"
    assert "66.0 MiB of /dev/shm and 64.0 MiB are free" in caplog.text and "--shm-size" in caplog.text
    monkeypatch.setattr(worker_processes.resource, "getrlimit", lambda _: (256, 256))
    assert choose_sharing(1 << 10, 64, processes=1) == "names"
    assert "only 256 open files" in caplog.text


def test_loader__the_room_it_asks_for_holds_what_workers_hand_over(make_corpus):
    loader = loader_of(make_corpus(), MIXED, last_step=6)
    sizes = [sum(view.nbytes for view in batch.views.values()) for batch in loader]
    assert loader.maker.batch_bytes() == max(sizes) > min(sizes)


@pytest.mark.parametrize("sharing", ["values", "names"])
def test_loader__each_way_of_sharing_gives_the_same_batches(make_corpus, monkeypatch, sharing):
    corpus = make_corpus()
    alone = list(loader_of(corpus))
    monkeypatch.setattr("meddino_pretrain.data.loader.choose_sharing", lambda *_: sharing)
    for one, other in zip(alone, loader_of(corpus, workers=2), strict=True):
        assert_equal(one, other)


def test_build_loader__a_corpus_smaller_than_a_batch_says_so(make_corpus, caplog):
    config = load_config(PretrainConfig, [Path(__file__).with_name("tiny.yaml")], [])
    stage, corpus = config.stages["stage1_pretrain"], make_corpus(count=3)
    with caplog.at_level(logging.WARNING):
        loader = build_loader(config, stage, 0, corpus, 8, pin_memory=False, first_step=0, stopped=lambda: False)
    assert "holds 3 slices, a batch 4: each shows slices more than once" in caplog.text
    assert len(next(iter(loader)).keys) == 4


def test_loader__a_corpus_of_schema_1_trains_as_one_of_today(tmp_path):
    slices = [disc_slice(number, 96, 80) for number in range(16)]
    old, new = (Corpus(write_corpus(tmp_path / str(schema), slices, schema=schema)) for schema in (1, 2))
    for one, other in zip(loader_of(old), loader_of(new), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("crops", [CROPS, MIXED], ids=["gram", "mixed"])
@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_loader__ranks_and_accumulation_change_nothing(make_corpus, crops, world_size, accumulation):
    corpus = make_corpus()
    whole = list(loader_of(corpus, crops))
    shares = [
        list(loader_of(corpus, crops, rank=rank, world_size=world_size, accumulation=accumulation))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [b for share in shares for b in share if b.step == step]
        assert len(parts) == world_size * accumulation
        assert [key for b in parts for key in b.keys] == expected.keys
        for name, tensor in tensors_of(expected).items():
            if not name.startswith("extras.mask_"):  # these follow from the masks
                assert torch.equal(by_sample(parts, name, expected), tensor), name


@pytest.mark.parametrize("first_step", [1, 2])
def test_loader__resumes_at_any_step(make_corpus, first_step):
    corpus = make_corpus()
    whole, resumed = list(loader_of(corpus, MIXED)), list(loader_of(corpus, MIXED, first_step=first_step))
    assert [b.step for b in resumed] == list(range(first_step, 3))
    for one, other in zip(whole[first_step:], resumed, strict=True):
        assert_equal(one, other)


def test_loader__steps_and_seeds_differ(make_corpus):
    corpus = make_corpus()
    first, second, _ = loader_of(corpus)
    other = next(iter(loader_of(corpus, seed=8)))
    assert first.keys not in (second.keys, other.keys)
    assert not torch.equal(first.views["global_crops"], other.views["global_crops"])


def test_batch__a_view_that_is_taken_is_not_held_and_the_same_when_made_again(make_corpus):
    raw = next(iter(loader_of(make_corpus())))
    batch = to_model_input(raw, crop_views(CROPS), find_machine("cpu"), INTENSITIES)
    kept = batch.views["global_crops"]
    assert batch.views["global_crops"] is kept and batch.take("global_crops") is kept
    again = batch.take("global_crops")
    assert again is not kept and torch.equal(again, kept)


def test_loader__sends_its_dataset_to_a_spawned_process(make_corpus):
    maker = loader_of(make_corpus()).maker
    maker.make(0, 0)  # files are open now
    assert_equal(pickle.loads(pickle.dumps(maker)).make(1, 0), maker.make(1, 0))


def test_loader__workers_outlive_the_signals_that_a_scheduler_sends_to_all(make_corpus):
    corpus = make_corpus(count=8)
    expected = list(loader_of(corpus, last_step=12))
    batches = iter(loader_of(corpus, workers=2, last_step=12))
    seen = [next(batches)]
    for child in multiprocessing.active_children():
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(child.pid, name)
    seen += list(batches)
    for one, other in zip(expected, seen, strict=True):
        assert_equal(one, other)


def test_loader__workers_end_when_the_trainer_ends_them(make_corpus):
    before = set(multiprocessing.active_children())
    batches = iter(loader_of(make_corpus(count=8), workers=1, last_step=50))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    with contextlib.suppress(RuntimeError):  # torch's, should it see the worker go before the loop is done
        for _ in range(2):  # what torch, and then Python, do with a worker that does not answer
            worker.terminate()
            worker.join(timeout=5)
    assert not worker.is_alive()


def test_loader__workers_end_with_the_process_though_their_iterator_stands(make_corpus):
    before = set(multiprocessing.active_children())
    batches = iter(loader_of(make_corpus(count=8), workers=1, last_step=50))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    end_worker(worker)  # what is registered for the process's end
    worker.join(timeout=20)
    assert worker.exitcode == -signal.SIGKILL
    end_worker(worker)  # gone already: nothing to do


def test_loader__files_open_before_a_fork_are_read_at_places_of_ones_own(make_corpus):
    corpus = make_corpus(count=8)
    expected = [corpus.read(index) for index in range(8)]
    # A forked process shares the position in these files, so reading must neither use nor move it.
    assert corpus.shards._files
    for stream in corpus.shards._files.values():
        assert stream.tell() == 0
        stream.seek(77)
    assert all(np.array_equal(corpus.read(index), hu) for index, hu in enumerate(expected))


def test_raw_batch__every_tensor_is_pinned(make_corpus, monkeypatch):
    batch = next(iter(loader_of(make_corpus(count=8))))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    assert_equal(batch.pin_memory(), batch)
    assert len(pinned) == len(tensors_of(batch)) == 9


def test_loader__without_masks_or_local_crops(make_corpus):
    crops = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16),), num_local=0)
    raw = next(iter(loader_of(make_corpus(), crops, masking=MaskingConfig(probability=0.0))))
    batch = to_model_input(raw, crop_views(crops), find_machine("cpu"), INTENSITIES)
    assert batch.views.keys() == {"global_crops"}
    assert batch.extras["mask_indices"].numel() == 0 and batch.extras["mask_weights"].numel() == 0


def test_loader__carries_boxes_in_pixels_of_the_slice_where_they_are_wanted(make_corpus):
    views = {"one": View(2, (0.3, 0.5)), "again": View(2, boxes_of="one", augmented=False)}
    spec = ViewSpec(views, (ViewSizes({"one": 16, "again": 32}),), with_boxes=True)
    loader = loader_of(make_corpus(), spec)
    loader.maker = replace(loader.maker, collate=lambda raw, order: raw)
    batch = next(iter(loader))
    assert batch.boxes.keys() == {"one", "again"} and torch.equal(batch.boxes["one"], batch.boxes["again"])
    top, left, height, width, flipped, rows, columns = batch.boxes["one"].T
    assert set(rows.tolist()) == {96} and set(columns.tolist()) == {80}
    assert (top + height).max() <= 96 and (left + width).max() <= 80 and set(flipped.tolist()) == {0, 1}
    area = (height * width).double() / (96 * 80)
    assert area.min() > 0.28 and area.max() < 0.52


def test_loader__model_input_has_the_shapes_and_range(make_corpus):
    raw = next(iter(loader_of(make_corpus())))
    batch = to_model_input(raw, crop_views(CROPS), find_machine("cpu"), INTENSITIES)
    shapes = {name: tuple(view.shape) for name, view in batch.views.items()}
    assert shapes == {"global_crops": (16, 3, 32, 32), "local_crops": (24, 3, 16, 16), "gram_teacher_crops": (16, 3, 64, 64)}
    contract, seen = INTENSITIES.contracts[0], batch.views["global_crops"]
    low, high = (contract.hu_min - contract.mean) / contract.std, (contract.hu_max - contract.mean) / contract.std
    assert low - 1e-4 <= seen.min() and seen.max() <= high + 1e-4
    assert raw.data_wait_s > 0


def test_loader__any_slice_size(make_corpus):
    for number, (rows, cols, spacing) in enumerate([(73, 47, (0.5, 1.5)), (9, 200, (1.0, 0.3)), (300, 260, (0.7, 0.7))]):
        corpus = make_corpus(count=4, rows=rows, cols=cols, spacing_mm=spacing, name=f"c{number}")
        batch = next(iter(loader_of(corpus, last_step=1)))
        assert batch.views["gram_teacher_crops"].shape == (16, 64, 64)


def damage(corpus, index: int) -> None:
    shard = corpus.root / "shards" / corpus.slices.column("shard")[index].as_py()
    data = bytearray(shard.read_bytes())
    data[corpus.slices.column("offset")[index].as_py() + 40] ^= 0xFF
    shard.write_bytes(bytes(data))


def test_loader__another_sample_is_taken_for_a_corrupt_one(make_corpus):
    corpus = make_corpus(count=8)
    healthy = list(loader_of(corpus))
    damage(corpus, 3)
    bad_key = corpus.key(3)
    batches = list(loader_of(corpus))
    for one, other in zip(batches, loader_of(corpus, workers=1), strict=True):
        assert_equal(one, other)
    spec, machine = crop_views(CROPS), find_machine("cpu")
    met = [each for batch in batches for each in to_model_input(batch, spec, machine, INTENSITIES).corrupt]
    assert len(met) == 3 and len(set(met)) == 1  # once in each epoch, which is a step here
    assert met[0][0] == bad_key and f"sample {bad_key}: " in met[0][1]
    assert all(bad_key not in b.keys for b in batches)
    for before, after in zip(healthy, batches, strict=True):
        kept = [i for i, key in enumerate(before.keys) if key != bad_key]
        assert [after.keys[i] for i in kept] == [before.keys[i] for i in kept]
        assert torch.equal(after.extras["masks"], before.extras["masks"])


@pytest.mark.parametrize("workers", [0, 1])
def test_loader__all_slices_damaged(make_corpus, workers):
    corpus = make_corpus(count=2)
    damage(corpus, 0)
    damage(corpus, 1)
    # The walk over fallbacks ends with the corpus.
    before = set(multiprocessing.active_children())
    with pytest.raises(ShardError, match=r"none of 2 slices tried in corpus .* can be read") as caught:
        list(loader_of(corpus, workers=workers))
    assert set(multiprocessing.active_children()) <= before  # while the error, and its traceback, still stand
    assert "\n" not in str(caught.value)


def test_loader__only_so_many_fallbacks_are_tried(make_corpus, monkeypatch):
    monkeypatch.setattr("meddino_pretrain.data.loader.MAX_TRIED", 3)
    corpus = make_corpus(count=6)
    for index in range(6):
        damage(corpus, index)
    with pytest.raises(ShardError, match="none of 3 slices tried"):
        list(loader_of(corpus))


def test_loader__a_batch_that_does_not_divide_is_refused(make_corpus):
    with pytest.raises(ConfigError, match="global batch 8 does not divide over 3 processes x 1 micro-batches"):
        loader_of(make_corpus(count=4), world_size=3)
