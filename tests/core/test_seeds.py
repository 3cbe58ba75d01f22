import numpy as np
import pytest
import torch

from meddino.core.seeds import derive_seed, numpy_rng, shuffled_index, torch_rng


def test_derive_seed__is_pinned():
    # A change here silently changes every run that is to be resumed: it needs a new corpus and run version.
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(7, "crop", 12) == 8738650299319004902
    assert [shuffled_index(place, 10, 7) for place in range(10)] == [5, 8, 0, 1, 7, 4, 9, 2, 6, 3]
    assert derive_seed(0, "crop", 1) != derive_seed(0, "crop1")
    assert derive_seed(0, 1) != derive_seed(0, "1")
    assert derive_seed(0, 1, 2) != derive_seed(0, 12)
    assert derive_seed(1, 1) != derive_seed(0, 1)


def test_rngs__same_position_same_numbers():
    assert np.array_equal(numpy_rng(1, "a", 2).random(5), numpy_rng(1, "a", 2).random(5))
    assert torch.equal(torch.rand(5, generator=torch_rng(1, "a")), torch.rand(5, generator=torch_rng(1, "a")))
    assert not np.array_equal(numpy_rng(1, "a", 2).random(5), numpy_rng(1, "a", 3).random(5))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1027])
def test_shuffled_index__each_stretch_is_another_permutation(size):
    stretches = [[shuffled_index(epoch * size + place, size, seed=7) for place in range(size)] for epoch in range(3)]
    assert all(sorted(stretch) == list(range(size)) for stretch in stretches)
    if size > 3:
        assert stretches[0] != stretches[1] != stretches[2]
        assert stretches[0] != list(range(size))


def test_shuffled_index__first_place_is_uniform():
    counts = np.bincount([shuffled_index(0, 10, seed) for seed in range(4000)], minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_shuffled_index__refuses_nonsense():
    with pytest.raises(ValueError, match="size >= 1"):
        shuffled_index(0, 0, 1)
