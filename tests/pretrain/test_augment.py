"""What happens to intensities."""

import numpy as np
import pytest
import torch
from meddino_pretrain.data.augmentations import apply_ct, change_image, change_mr, draw_ct, draw_image, draw_mr
from meddino_pretrain.data.config import AugmentConfig, CTAugment, ImageAugment, MRAugment
from pydantic import ValidationError

from meddino.core.seeds import numpy_rng
from meddino.data.intensity import CTIntensity
from meddino.data.model_input import normalise

CONTRACT = CTIntensity()
PLAIN = CTAugment(scale_probability=0.0, gamma_probability=0.0, window_contract_probability=1.0)


def rng(number: int) -> np.random.Generator:
    return numpy_rng(0, "intensity", number)


def test_draw_ct__windows_follow_the_config():
    rows = np.concatenate([draw_ct(CTAugment(), CONTRACT, rng(n), 10) for n in range(400)])
    lower, upper, gamma, scale = rows.T
    own = (lower == CONTRACT.hu_min) & (upper == CONTRACT.hu_max)
    assert own.mean() == pytest.approx(0.5, abs=0.04)
    level, width = (lower + upper)[~own] / 2, (upper - lower)[~own]
    assert -150 <= level.min() < -140 and 140 < level.max() <= 150
    assert 399.9 <= width.min() < 410 and 1950 < width.max() <= 2000.1
    assert np.log(width).mean() == pytest.approx((np.log(400) + np.log(2000)) / 2, abs=0.05)
    assert (gamma != 1).mean() == pytest.approx(0.1, abs=0.04) and gamma.min() >= 0.7 and gamma.max() <= 1.5
    assert (scale != 1).mean() == pytest.approx(0.15, abs=0.05) and scale.min() >= 0.75 and scale.max() <= 1.25


def test_draw_ct__gamma_and_scale_are_the_images_and_windows_the_crops():
    config = CTAugment(gamma_probability=1.0, scale_probability=1.0, window_contract_probability=0.0)
    rows = draw_ct(config, CONTRACT, rng(0), 6)
    assert len(np.unique(rows[:, 0])) == 6 and len(np.unique(rows[:, 2])) == len(np.unique(rows[:, 3])) == 1
    shared = draw_ct(CTAugment(window_per="image", window_contract_probability=0.0), CONTRACT, rng(0), 6)
    assert len(np.unique(shared[:, 0])) == len(np.unique(shared[:, 1])) == 1
    assert np.array_equal(rows[:4], draw_ct(config, CONTRACT, rng(0), 4))


def slow_intensity(hu: float, lower: float, upper: float, gamma: float, scale: float) -> float:
    unit = (min(max(hu, lower), upper) - lower) / (upper - lower)
    value = unit**gamma * (CONTRACT.hu_max - CONTRACT.hu_min) + CONTRACT.hu_min
    value = CONTRACT.mean + scale * (value - CONTRACT.mean)
    return (min(max(value, CONTRACT.hu_min), CONTRACT.hu_max) - CONTRACT.mean) / CONTRACT.std


def test_apply_ct__equals_a_slow_loop():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (4, 3, 5)).astype(np.int16))
    rows = torch.tensor([[-1000, 1000, 1, 1], [-160, 240, 0.7, 1], [-500, 700, 1.5, 1.25], [-1000, 1000, 1, 0.75]])
    result = apply_ct(hu, rows, CONTRACT)
    assert result.shape == (4, 3, 3, 5)
    for i, row in enumerate(rows.tolist()):
        for y in range(3):
            for x in range(5):
                expected = slow_intensity(int(hu[i, y, x]), *row)
                assert result[i, :, y, x].tolist() == pytest.approx([expected] * 3, abs=2e-5)


def test_apply_ct__spared_image_is_exactly_the_contracts():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (2, 6, 6)).astype(np.int16))
    rows = torch.from_numpy(draw_ct(PLAIN, CONTRACT, rng(0), 2))
    assert torch.allclose(apply_ct(hu, rows, CONTRACT), normalise(hu.float(), CONTRACT), atol=1e-6)


def test_apply_ct__undistorted_keeps_only_the_window():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1200, 2000, (1, 6, 6)).astype(np.int16))
    distorted, plain = torch.tensor([[-300.0, 500, 1.3, 1.2]]), torch.tensor([[-300.0, 500, 1, 1]])
    assert torch.equal(apply_ct(hu, distorted, CONTRACT, undistorted=True), apply_ct(hu, plain, CONTRACT, undistorted=False))
    assert not torch.equal(apply_ct(hu, distorted, CONTRACT), apply_ct(hu, plain, CONTRACT))


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
def test_ct_augment__refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValidationError, match=message):
        CTAugment(**change)


@pytest.mark.parametrize(
    ("config", "change", "name"),
    [(MRAugment, {"gamma_range": (1.5, 0.7)}, "gamma_range"), (ImageAugment, {"contrast": 1.0}, "contrast")],
)
def test_other_augment__refuses_what_makes_no_sense(config, change, name):
    with pytest.raises(ValidationError, match=name):
        config(**change)


def test_augment_config__keys_written_when_all_was_ct_are_ct():
    old = {"noise_probability": 0.3, "window_per": "image"}
    assert AugmentConfig.model_validate(old).ct == CTAugment(noise_probability=0.3, window_per="image")
    assert AugmentConfig.model_validate({"mr": {"bias_field_strength": 0.2}}).mr.bias_field_strength == 0.2
    with pytest.raises(ValidationError, match="gama_range"):
        AugmentConfig.model_validate({"gama_range": (0.5, 1.0)})


def test_draw_mr__gamma_and_field_follow_the_config_and_are_each_views_own():
    rows = np.concatenate([draw_mr(MRAugment(), rng(n), 10) for n in range(400)])
    gamma, field = rows[:, 0], rows[:, 1:]
    assert (gamma != 1).mean() == pytest.approx(0.5, abs=0.03) and 0.74 <= gamma.min() < 0.75 and 1.33 < gamma.max() <= 1.3501
    struck = (field != 0).any(1)
    assert struck.mean() == pytest.approx(0.5, abs=0.03) and 0.48 < np.abs(field).max() <= 0.5
    assert np.array_equal(draw_mr(MRAugment(), rng(3), 10)[:4], draw_mr(MRAugment(), rng(3), 4))


def test_change_mr__equals_a_slow_loop():
    unit = torch.from_numpy(np.random.default_rng(0).random((2, 1, 4, 6)).astype(np.float32))
    rows = torch.tensor([[1.3, 0.2, -0.1, 0.4, 0.0, -0.3], [1.0, 0, 0, 0, 0, 0]])
    result = change_mr(unit, rows)
    gamma, *c = rows[0].tolist()
    field = np.empty((4, 6))
    for i, y in enumerate(np.linspace(-1, 1, 4)):
        for j, x in enumerate(np.linspace(-1, 1, 6)):
            field[i, j] = np.exp(c[0] * x + c[1] * y + c[2] * x * x + c[3] * x * y + c[4] * y * y)
    expected = np.clip(unit[0, 0].numpy() ** gamma * field / field.mean(), 0, 1)
    assert result[0, 0].numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(result[1], unit[1])


def test_draw_image__changes_follow_the_config():
    rows = np.concatenate([draw_image(ImageAugment(), rng(n), 10) for n in range(400)])
    struck = (rows != np.array([1, 1, 1, 0])).any(1)
    assert struck.mean() == pytest.approx(0.8, abs=0.03)
    assert np.abs(rows - np.array([1, 1, 1, 0])).max(0) == pytest.approx([0.4, 0.4, 0.2, 0.1], rel=0.02)
    assert np.array_equal(draw_image(ImageAugment(), rng(3), 10)[:4], draw_image(ImageAugment(), rng(3), 4))


def test_change_image__brightness_and_contrast_are_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.functional")
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 8, 9)).astype(np.float32)) * 0.6 + 0.2
    for brightness, contrast in ((1.2, 1.0), (1.0, 0.8), (0.8, 1.1)):
        found = change_image(images, torch.tensor([[brightness, contrast, 1.0, 0.0]]))
        expected = functional.adjust_contrast(functional.adjust_brightness(images, brightness), contrast)
        assert torch.allclose(found, expected, atol=2e-3)


def test_change_image__colour_turns_and_fades_and_leaves_grey_alone():
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 8, 9)).astype(np.float32)) * 0.3 + 0.35
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    faded = change_image(images, torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2))
    assert torch.allclose(faded, (images * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-3)
    turned = change_image(images, torch.tensor([[1.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]]))
    assert not torch.allclose(turned[0], images[0], atol=0.02) and torch.allclose(turned[1], images[1], atol=1e-3)
    assert torch.allclose((turned * weights).sum(1), (images * weights).sum(1), atol=2e-3)
    grey = images[:, :1]
    assert torch.allclose(change_image(grey, torch.tensor([[1.0, 1.0, 0.3, 0.3]] * 2)), grey, atol=1e-6)
