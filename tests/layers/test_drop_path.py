"""Drop path's subset and its scale."""

import torch

from meddino.layers.drop_path import CropIndices, DropPathPlan

CPU = torch.device("cpu")


def test_of_samples__crop_major():
    numbers = CropIndices.of_samples(2, [1, 3], global_batch=4)
    assert numbers.indices == (1, 3, 5, 7)
    assert numbers.total == 8


def test_kept_samples__global_count_and_scale():
    draws = DropPathPlan(5, 7, (CropIndices.of_samples(2, range(5), 5), CropIndices.of_samples(3, range(5), 5)))
    branches = draws.kept_samples(3, 0.3, CPU)
    assert len(branches) == 6
    for kept in branches:
        assert [len(index) for index in kept.indices] == [7, 10]
        assert kept.scales == (10 / 7, 15 / 10)
        assert all(len(index.unique()) == len(index) for index in kept.indices)
    assert not torch.equal(branches[0].indices[1], branches[2].indices[1])
    assert not torch.equal(branches[0].indices[1], branches[1].indices[1])


def test_kept_samples__parts_of_a_batch_keep_what_the_whole_keeps():
    whole = DropPathPlan(1, 2, (CropIndices.of_samples(2, range(6), 6),)).kept_samples(2, 0.4, CPU)
    for branch in (0, 1):
        expected = {int(index) for index in whole[2 + branch].indices[0]}
        found = set()
        for samples in ([0, 1, 2], [3, 4], [5]):
            numbers = CropIndices.of_samples(2, samples, 6)
            part = DropPathPlan(1, 2, (numbers,)).kept_samples(2, 0.4, CPU)[2 + branch]
            found |= {numbers.indices[int(index)] for index in part.indices[0]}
            assert part.scales == whole[2 + branch].scales
        assert found == expected


def test_kept_samples__step_and_seed_matter_and_repeat():
    def kept(seed, step):
        return DropPathPlan(seed, step, (CropIndices.of_samples(1, range(64), 64),)).kept_samples(1, 0.5, CPU)[0].indices[0]

    assert torch.equal(kept(1, 2), kept(1, 2))
    assert not torch.equal(kept(1, 2), kept(1, 3))
    assert not torch.equal(kept(1, 2), kept(2, 2))


def test_kept_samples__at_least_one():
    kept = DropPathPlan(0, 0, (CropIndices.of_samples(1, range(2), 2),)).kept_samples(1, 0.9, CPU)[0]
    assert len(kept.indices[0]) == 1
    assert kept.scales == (2.0,)


def test_from_generator__follows_the_generator():
    first = DropPathPlan.from_generator(torch.Generator().manual_seed(3), [4])
    again = DropPathPlan.from_generator(torch.Generator().manual_seed(3), [4])
    assert first == again
    assert first.groups[0] == CropIndices((0, 1, 2, 3), 4)
