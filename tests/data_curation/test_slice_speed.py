"""What is written out for speed gives what SciPy and NumPy give."""

import numpy as np
import pytest
from meddino_data_curation.fingerprint import _averaged
from meddino_data_curation.slice_choice import _filled, _opened, slice_statistics
from scipy import ndimage

from tests.data_curation.conftest import make_hu


@pytest.mark.parametrize("seed", range(8))
def test_body_mask__opening_and_filling_are_scipys(seed):
    noise = np.random.default_rng(seed).normal(size=(130 - seed, 101 + seed))
    mask = ndimage.gaussian_filter(noise, 1 + seed / 4) > 0
    assert np.array_equal(_opened(mask), ndimage.binary_opening(mask))
    assert np.array_equal(_filled(mask), ndimage.binary_fill_holes(mask))
    assert not _filled(np.zeros((5, 7), bool)).any()
    assert _filled(np.ones((5, 7), bool)).all()


@pytest.mark.parametrize("shape", [(64, 72), (63, 71), (300, 512)])
def test_slice_statistics__percentiles_are_numpys_nearest(shape):
    hu = make_hu(0, (1, *shape))[0]
    statistics, _ = slice_statistics(hu)
    step = max(1, max(shape) // 256)
    expected = np.percentile(hu[::step, ::step], (1, 50, 99), method="nearest")
    assert (statistics.hu_p01, statistics.hu_p50, statistics.hu_p99) == tuple(expected)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_averaged__is_the_mean_of_each_square(step):
    values = np.random.default_rng(step).integers(0, 331, (64, 75)).astype(np.int16)
    rows, cols = 64 // step, 75 // step
    expected = values[: rows * step, : cols * step].reshape(rows, step, cols, step).mean(axis=(1, 3))
    assert np.allclose(_averaged(values, step), expected, atol=1e-3)
