"""What is written out for speed gives what SciPy and NumPy give."""

import numpy as np
import pytest
from meddino_data_curation.selection.fingerprint import _averaged
from meddino_data_curation.selection.slice_choice import _filled, _flat_lines, _opened, slice_statistics
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
    step = max(1, max(shape) // 128)
    expected = np.percentile(hu[::step, ::step], (1, 50, 99), method="nearest")
    assert (statistics.p01, statistics.p50, statistics.p99) == tuple(expected)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_averaged__is_the_mean_of_each_square(step):
    values = np.random.default_rng(step).integers(0, 331, (64, 75)).astype(np.int16)
    rows, cols = 64 // step, 75 // step
    expected = values[: rows * step, : cols * step].reshape(rows, step, cols, step).mean(axis=(1, 3))
    assert np.allclose(_averaged(values, step), expected, atol=1e-3)


@pytest.mark.parametrize("step", [8, 10, 12])  # sums of 64 pixels fit in int16, those of 100 do not
def test_averaged__brightest_pixels_do_not_overflow(step):
    assert np.all(_averaged(np.full((64, 75), 330, np.int16), step) == 330)


def test_flat_lines__are_those_of_one_value():
    hu = np.random.default_rng(0).integers(-1024, 1000, (70, 90)).astype(np.int16)
    hu[[0, 1, 40, 69]] = np.array([[-1024], [7], [0], [-1024]])
    hu[40, 33] = 1  # between the columns that are looked at first
    for view in (hu, hu.T.copy().T, np.ascontiguousarray(hu.T).T):
        assert np.flatnonzero(_flat_lines(view)).tolist() == [0, 1, 69]
