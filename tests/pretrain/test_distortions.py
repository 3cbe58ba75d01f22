"""Low resolution, smoothing and noise of stored slices."""

import numpy as np
import pytest
from meddino_pretrain.data.config import CTAugment, MRAugment
from meddino_pretrain.data.distortions import distort_slice

NEVER = {"noise_probability": 0.0, "smoothing_probability": 0.0, "low_resolution_probability": 0.0}
PLAIN = CTAugment(**NEVER)


def test_distort_slice__spared_slices_are_untouched():
    hu = np.random.default_rng(0).integers(-1000, 1000, (40, 30)).astype(np.int16)
    assert distort_slice(hu, PLAIN, 1.0, 0, 0) is hu


def test_distort_slice__noise_has_the_standard_deviation_asked_for():
    hu = np.zeros((200, 200), dtype=np.int16)
    config = CTAugment(**NEVER | {"noise_probability": 1.0}, noise_sd_hu=(15.0, 15.0))
    noisy = distort_slice(hu, config, 1.0, 0, 3)
    assert noisy.dtype == np.int16 and noisy.std() == pytest.approx(15, rel=0.02) and abs(noisy.mean()) < 0.5
    assert not hu.any()
    assert np.array_equal(noisy, distort_slice(hu, config, 1.0, 0, 3))
    assert not np.array_equal(noisy, distort_slice(hu, config, 1.0, 0, 4))


def test_distort_slice__smoothing_is_a_gaussian():
    hu = np.zeros((41, 41), dtype=np.int16)
    hu[20, 20] = 10000
    config = CTAugment(**NEVER | {"smoothing_probability": 1.0}, smoothing_sigma_px=(0.8, 0.8))
    smooth = distort_slice(hu, config, 1.0, 0, 0)
    y, x = np.mgrid[-20:21, -20:21]
    expected = np.exp(-(y**2 + x**2) / (2 * 0.8**2))
    assert np.abs(smooth - 10000 * expected / expected.sum()).max() < 1


def test_distort_slice__low_resolution_loses_fine_detail_and_keeps_coarse():
    y, x = np.mgrid[0:96, 0:80]
    fine = (500 * ((x + y) % 2) - 250).astype(np.int16)
    coarse = (300 * np.sin(x / 12) + 200 * np.cos(y / 10)).astype(np.int16)
    config = CTAugment(**NEVER | {"low_resolution_probability": 1.0}, low_resolution_zoom=(0.5, 0.5))
    assert distort_slice(fine, config, 1.0, 0, 0).std() < 50
    assert np.abs(distort_slice(coarse, config, 1.0, 0, 0) - coarse)[2:-2, 2:-2].max() < 12


def test_distort_slice__chances_are_those_of_the_config():
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 8)).astype(np.int16)
    changed = np.mean([distort_slice(hu, CTAugment(), 1.0, 0, n) is not hu for n in range(1000)])
    assert changed == pytest.approx(1 - 0.9 * 0.8 * 0.75, abs=0.04)


def test_distort_slice__extreme_values_do_not_wrap_round():
    hu = np.full((32, 32), 32767, dtype=np.int16)
    config = CTAugment(**NEVER | {"noise_probability": 1.0}, noise_sd_hu=(20.0, 20.0))
    assert distort_slice(hu, config, 1.0, 0, 0).min() > 32000


def test_distort_slice__floats_keep_their_type_and_noise_follows_their_range():
    flat = np.full((200, 200), 500.0, dtype=np.float32)
    config = MRAugment(**NEVER | {"noise_probability": 1.0}, noise_sd=(0.02, 0.02))
    noisy = distort_slice(flat, config, 3000.0, 0, 0)
    assert noisy.dtype == np.float32 and noisy.std() == pytest.approx(60, rel=0.02)


def test_distort_slice__colour_is_distorted_channel_by_channel():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    config = MRAugment(**NEVER | {"smoothing_probability": 1.0, "low_resolution_probability": 1.0})
    result = distort_slice(rgb, config, 255.0, 0, 0)
    assert result.dtype == np.uint8 and result.shape == rgb.shape
    for channel in range(3):
        assert np.array_equal(result[..., channel], distort_slice(rgb[..., channel], config, 255.0, 0, 0))
