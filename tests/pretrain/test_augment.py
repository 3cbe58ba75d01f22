"""What happens to intensities."""

import numpy as np
import pytest
import torch
from meddino_pretrain.data.augmentations import apply_intensity, distort_slice, draw_intensity
from meddino_pretrain.data.config import AugmentConfig
from pydantic import ValidationError

from meddino.data.contract import InputContract
from meddino.data.model_input import normalise

CONTRACT = InputContract()
NEVER = {"noise_probability": 0.0, "smoothing_probability": 0.0, "low_resolution_probability": 0.0}
PLAIN = AugmentConfig(**NEVER, scale_probability=0.0, gamma_probability=0.0, window_contract_probability=1.0)


def test_distort_slice__spared_slices_are_untouched():
    hu = np.random.default_rng(0).integers(-1000, 1000, (40, 30)).astype(np.int16)
    assert distort_slice(hu, PLAIN, 0, 0) is hu


def test_distort_slice__noise_has_the_standard_deviation_asked_for():
    hu = np.zeros((200, 200), dtype=np.int16)
    config = AugmentConfig(**NEVER | {"noise_probability": 1.0}, noise_sd_hu=(15.0, 15.0))
    noisy = distort_slice(hu, config, 0, 3)
    assert noisy.dtype == np.int16 and noisy.std() == pytest.approx(15, rel=0.02) and abs(noisy.mean()) < 0.5
    assert not hu.any()
    assert np.array_equal(noisy, distort_slice(hu, config, 0, 3)) and not np.array_equal(noisy, distort_slice(hu, config, 0, 4))


def test_distort_slice__smoothing_is_a_gaussian():
    hu = np.zeros((41, 41), dtype=np.int16)
    hu[20, 20] = 10000
    config = AugmentConfig(**NEVER | {"smoothing_probability": 1.0}, smoothing_sigma_px=(0.8, 0.8))
    smooth = distort_slice(hu, config, 0, 0)
    y, x = np.mgrid[-20:21, -20:21]
    expected = np.exp(-(y**2 + x**2) / (2 * 0.8**2))
    assert np.abs(smooth - 10000 * expected / expected.sum()).max() < 1


def test_distort_slice__low_resolution_loses_fine_detail_and_keeps_coarse():
    y, x = np.mgrid[0:96, 0:80]
    fine = (500 * ((x + y) % 2) - 250).astype(np.int16)
    coarse = (300 * np.sin(x / 12) + 200 * np.cos(y / 10)).astype(np.int16)
    config = AugmentConfig(**NEVER | {"low_resolution_probability": 1.0}, low_resolution_zoom=(0.5, 0.5))
    assert distort_slice(fine, config, 0, 0).std() < 50
    assert np.abs(distort_slice(coarse, config, 0, 0) - coarse)[2:-2, 2:-2].max() < 12


def test_distort_slice__chances_are_those_of_the_config():
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 8)).astype(np.int16)
    changed = np.mean([distort_slice(hu, AugmentConfig(), 0, n) is not hu for n in range(1000)])
    assert changed == pytest.approx(1 - 0.9 * 0.8 * 0.75, abs=0.04)


def test_distort_slice__extreme_values_do_not_wrap_round():
    hu = np.full((32, 32), 32767, dtype=np.int16)
    config = AugmentConfig(**NEVER | {"noise_probability": 1.0}, noise_sd_hu=(20.0, 20.0))
    assert distort_slice(hu, config, 0, 0).min() > 32000


def test_draw_intensity__windows_follow_the_config():
    rows = np.concatenate([draw_intensity(AugmentConfig(), CONTRACT, 0, n, 10) for n in range(400)])
    lower, upper, gamma, scale = rows.T
    own = (lower == CONTRACT.hu_min) & (upper == CONTRACT.hu_max)
    assert own.mean() == pytest.approx(0.5, abs=0.04)
    level, width = (lower + upper)[~own] / 2, (upper - lower)[~own]
    assert -150 <= level.min() < -140 and 140 < level.max() <= 150
    assert 399.9 <= width.min() < 410 and 1950 < width.max() <= 2000.1
    assert np.log(width).mean() == pytest.approx((np.log(400) + np.log(2000)) / 2, abs=0.05)
    assert (gamma != 1).mean() == pytest.approx(0.1, abs=0.04) and gamma.min() >= 0.7 and gamma.max() <= 1.5
    assert (scale != 1).mean() == pytest.approx(0.15, abs=0.05) and scale.min() >= 0.75 and scale.max() <= 1.25


def test_draw_intensity__gamma_and_scale_are_the_images_and_windows_the_crops():
    config = AugmentConfig(gamma_probability=1.0, scale_probability=1.0, window_contract_probability=0.0)
    rows = draw_intensity(config, CONTRACT, 0, 0, 6)
    assert len(np.unique(rows[:, 0])) == 6 and len(np.unique(rows[:, 2])) == len(np.unique(rows[:, 3])) == 1
    shared = draw_intensity(AugmentConfig(window_per="image", window_contract_probability=0.0), CONTRACT, 0, 0, 6)
    assert len(np.unique(shared[:, 0])) == len(np.unique(shared[:, 1])) == 1
    assert np.array_equal(rows[:4], draw_intensity(config, CONTRACT, 0, 0, 4))


def slow_intensity(hu: float, lower: float, upper: float, gamma: float, scale: float) -> float:
    unit = (min(max(hu, lower), upper) - lower) / (upper - lower)
    value = unit**gamma * (CONTRACT.hu_max - CONTRACT.hu_min) + CONTRACT.hu_min
    value = CONTRACT.mean + scale * (value - CONTRACT.mean)
    return (min(max(value, CONTRACT.hu_min), CONTRACT.hu_max) - CONTRACT.mean) / CONTRACT.std


def test_apply_intensity__equals_a_slow_loop():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (4, 3, 5)).astype(np.int16))
    rows = torch.tensor([[-1000, 1000, 1, 1], [-160, 240, 0.7, 1], [-500, 700, 1.5, 1.25], [-1000, 1000, 1, 0.75]])
    result = apply_intensity(hu, rows, CONTRACT)
    assert result.shape == (4, 3, 3, 5)
    for i, row in enumerate(rows.tolist()):
        for y in range(3):
            for x in range(5):
                expected = slow_intensity(int(hu[i, y, x]), *row)
                assert result[i, :, y, x].tolist() == pytest.approx([expected] * 3, abs=2e-5)


def test_apply_intensity__spared_image_is_exactly_the_contracts():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (2, 6, 6)).astype(np.int16))
    rows = torch.from_numpy(draw_intensity(PLAIN, CONTRACT, 0, 0, 2))
    assert torch.allclose(apply_intensity(hu, rows, CONTRACT), normalise(hu.float(), CONTRACT), atol=1e-6)


def test_apply_intensity__undistorted_keeps_only_the_window():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (1, 6, 6)).astype(np.int16))
    distorted, plain = torch.tensor([[-300.0, 500, 1.3, 1.2]]), torch.tensor([[-300.0, 500, 1, 1]])
    assert torch.equal(
        apply_intensity(hu, distorted, CONTRACT, undistorted=True), apply_intensity(hu, plain, CONTRACT, undistorted=False)
    )
    assert not torch.equal(apply_intensity(hu, distorted, CONTRACT), apply_intensity(hu, plain, CONTRACT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_width_hu": (0.0, 100.0)}, "window_width_hu"),
        ({"window_level_hu": (100.0, -100.0)}, r"window_level_hu \[100.0, -100.0\] must ascend"),
        ({"low_resolution_zoom": (0.5, 1.5)}, "must not be above 1"),
        ({"gamma_range": (0.0, 1.0)}, "gamma_range"),
        ({"noise_probability": 1.2}, "noise_probability"),
    ],
)
def test_augment_config__refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValidationError, match=message):
        AugmentConfig(**change)
