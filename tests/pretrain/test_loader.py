"""Batches are pure functions of seed, step and place."""

import contextlib
import multiprocessing
import os
import pickle
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from meddino_pretrain.data.batches import RawBatch, to_model_input
from meddino_pretrain.data.config import CropsConfig, CropSizes, LoaderConfig
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.loader import Loader, _end_worker, build_loader
from meddino_pretrain.methods.dinov3.config import MaskingConfig

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError, ShardError, StoppedEarly
from meddino.core.logging import setup_logging
from meddino.data.corpus import Corpus
from meddino.data.intensity import CTIntensity
from tests.data.tiny_corpus import write_corpus
from tests.pretrain.conftest import disc_slice

CONTRACT = CTIntensity()
INTENSITIES = Intensities((CONTRACT,))
CROPS = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16, gram_px=64),), num_local=3)
MIXED = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16), CropSizes(global_px=48, local_px=16, weight=2.0)), num_local=2)


def loader_of(corpus, crops=CROPS, workers=0, masking=None, **changes) -> Loader:
    options = {"patch_size": 8, "seed": 7, "global_batch": 8, "first_step": 0, "last_step": 3} | changes
    config = LoaderConfig(workers=workers)
    return build_loader(corpus, crops, masking or MaskingConfig(), INTENSITIES, config, **options)


def assert_equal(one: RawBatch, other: RawBatch) -> None:
    for field in fields(RawBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "data_wait_s":
            continue
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def by_place(batches: list[RawBatch], name: str, crops: int) -> torch.Tensor:
    """Put micro-batches (crop-major each) together into one crop-major batch."""
    parts = [getattr(b, name).unflatten(0, (crops, -1)) for b in batches]
    return torch.cat(parts, dim=1).flatten(0, 1)


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
    with pytest.raises(StoppedEarly, match="worker of the loader was killed"):
        list(batches)


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
        for name, count in (("global_stored", 2), ("local_stored", crops.num_local), ("global_intensity", 2), ("masks", 2)):
            assert torch.equal(by_place(parts, name, count), getattr(expected, name)), name
        if expected.gram_stored is not None:
            assert torch.equal(by_place(parts, "gram_stored", 2), expected.gram_stored)


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
    assert not torch.equal(first.global_stored, other.global_stored)


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
    _end_worker(worker)  # what is registered for the process's end
    with contextlib.suppress(RuntimeError):
        worker.join(timeout=20)
    assert worker.exitcode == 0
    _end_worker(worker)  # gone already: nothing to do


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
    assert len(pinned) == sum(isinstance(getattr(batch, field.name), torch.Tensor) for field in fields(batch)) == 8


def test_loader__mask_indices_and_weights_follow_the_masks(make_corpus):
    batch = next(iter(loader_of(make_corpus())))
    indices, weights = [], []
    for row, mask in enumerate(batch.masks.numpy()):
        for patch, hidden in enumerate(mask):
            if hidden:
                indices.append(row * len(mask) + patch)
                weights.append(1 / mask.sum())
    assert batch.mask_indices.tolist() == indices
    assert np.allclose(batch.mask_weights, weights)
    assert batch.mask_weights.sum().item() == pytest.approx(int(batch.masks.any(dim=1).sum()))


def test_loader__without_masks_or_local_crops(make_corpus):
    crops = CropsConfig(sizes=(CropSizes(global_px=32, local_px=16),), num_local=0)
    raw = next(iter(loader_of(make_corpus(), crops, masking=MaskingConfig(probability=0.0))))
    batch = to_model_input(raw, find_machine("cpu"), INTENSITIES)
    assert batch.local_crops.shape == (0, 3, 16, 16)
    assert batch.mask_indices.numel() == 0 and batch.mask_weights.numel() == 0 and batch.gram_teacher_crops is None


def test_loader__model_input_has_the_shapes_and_range(make_corpus):
    raw = next(iter(loader_of(make_corpus())))
    batch = to_model_input(raw, find_machine("cpu"), INTENSITIES)
    assert batch.global_crops.shape == (16, 3, 32, 32)
    assert batch.local_crops.shape == (24, 3, 16, 16)
    assert batch.gram_teacher_crops.shape == (16, 3, 64, 64)
    low, high = (CONTRACT.hu_min - CONTRACT.mean) / CONTRACT.std, (CONTRACT.hu_max - CONTRACT.mean) / CONTRACT.std
    assert low - 1e-4 <= batch.global_crops.min() and batch.global_crops.max() <= high + 1e-4
    assert raw.data_wait_s > 0


def test_loader__any_slice_size(make_corpus):
    for number, (rows, cols, spacing) in enumerate([(73, 47, (0.5, 1.5)), (9, 200, (1.0, 0.3)), (300, 260, (0.7, 0.7))]):
        corpus = make_corpus(count=4, rows=rows, cols=cols, spacing_mm=spacing, name=f"c{number}")
        batch = next(iter(loader_of(corpus, last_step=1)))
        assert batch.gram_stored.shape == (16, 64, 64)


def damage(corpus, index: int) -> None:
    shard = corpus.root / "shards" / corpus.slices.column("shard")[index].as_py()
    data = bytearray(shard.read_bytes())
    data[corpus.slices.column("offset")[index].as_py() + 40] ^= 0xFF
    shard.write_bytes(bytes(data))


def test_loader__damaged_slice_is_stood_in_for(make_corpus):
    corpus = make_corpus(count=8)
    healthy = list(loader_of(corpus))
    damage(corpus, 3)
    bad_key = corpus.key(3)
    batches = list(loader_of(corpus))
    for one, other in zip(batches, loader_of(corpus, workers=1), strict=True):
        assert_equal(one, other)
    met = [each for batch in batches for each in to_model_input(batch, find_machine("cpu"), INTENSITIES).damaged]
    assert len(met) == 3 and len(set(met)) == 1  # once in each epoch, which is a step here
    assert met[0][0] == bad_key and f"sample {bad_key}: " in met[0][1]
    assert all(bad_key not in b.keys for b in batches)
    for before, after in zip(healthy, batches, strict=True):
        kept = [i for i, key in enumerate(before.keys) if key != bad_key]
        assert [after.keys[i] for i in kept] == [before.keys[i] for i in kept]
        assert torch.equal(after.masks, before.masks)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader__all_slices_damaged(make_corpus, workers):
    corpus = make_corpus(count=2)
    damage(corpus, 0)
    damage(corpus, 1)
    # The walk over stand-ins ends with the corpus.
    before = set(multiprocessing.active_children())
    with pytest.raises(ShardError, match=r"none of 2 slices tried in corpus .* can be read") as caught:
        list(loader_of(corpus, workers=workers))
    assert set(multiprocessing.active_children()) <= before  # while the error, and its traceback, still stand
    assert "\n" not in str(caught.value)


def test_loader__only_so_many_stand_ins_are_tried(make_corpus, monkeypatch):
    monkeypatch.setattr("meddino_pretrain.data.loader.MAX_TRIED", 3)
    corpus = make_corpus(count=6)
    for index in range(6):
        damage(corpus, index)
    with pytest.raises(ShardError, match="none of 3 slices tried"):
        list(loader_of(corpus))


def test_loader__a_batch_that_does_not_divide_is_refused(make_corpus):
    with pytest.raises(ConfigError, match="global batch 8 does not divide over 3 processes x 1 micro-batches"):
        loader_of(make_corpus(count=4), world_size=3)


def test_loader__a_crop_that_does_not_divide_into_patches_is_refused(make_corpus):
    with pytest.raises(ConfigError, match=r"crops.sizes.0.global_px=32, .*: not a multiple of the patch size 5"):
        loader_of(make_corpus(count=4), patch_size=5)
