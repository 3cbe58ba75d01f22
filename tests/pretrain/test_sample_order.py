"""The walk over a corpus and how ranks share it."""

from itertools import islice

import pytest
from meddino_pretrain.data.sampler import BatchShare, SampleOrder

from meddino.core.errors import ConfigError


def test_sample_order__every_epoch_visits_every_slice_once():
    order = SampleOrder(seed=3, size=21, global_batch=6)
    walk = [index for step in range(7) for index in order.slices_for_step(step)]  # 42 = two epochs
    assert sorted(walk[:21]) == sorted(walk[21:]) == list(range(21))
    assert walk[:21] != walk[21:]


def test_sample_order__another_seed_is_another_walk():
    assert SampleOrder(1, 100, 10).slices_for_step(0) != SampleOrder(2, 100, 10).slices_for_step(0)


def test_sample_order__global_batch_only_cuts_the_walk():
    fine, coarse = SampleOrder(5, 33, 2), SampleOrder(5, 33, 8)
    assert [i for step in range(4) for i in fine.slices_for_step(step)] == coarse.slices_for_step(0)


def test_sample_order__fallbacks_are_all_slices_in_an_order_of_the_sample():
    order = SampleOrder(3, 12, 4)
    assert sorted(order.fallbacks(5)) == list(range(12))
    assert list(order.fallbacks(5)) != list(order.fallbacks(6))
    assert list(islice(order.fallbacks(5), 3)) == list(order.fallbacks(5))[:3]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 3), (4, 3)])
def test_batch_share__parts_in_order_of_rank_and_micro_step_are_the_batch(world_size, accumulation):
    parts = [
        place
        for rank in range(world_size)
        for micro_step in range(accumulation)
        for place in BatchShare(24, rank, world_size, accumulation).samples(micro_step)
    ]
    assert parts == list(range(24))


def test_batch_share__what_does_not_divide_is_refused_with_a_way_out():
    message = r"global batch 10 does not divide over 3 processes x 1 micro-batches = 3 parts; .* \(the nearest: 2\)"
    with pytest.raises(ConfigError, match=message):
        BatchShare(10, rank=0, world_size=3)
