"""From stored values to model input, against loops over single values."""

import numpy as np
import pytest
import torch

from meddino.core.errors import ConfigError
from meddino.data.intensity import CTIntensity, ImageIntensity, MRIntensity
from meddino.data.model_input import (
    is_foreground,
    normalise,
    normalise_channels,
    stretch_window,
    to_picture,
    to_unit,
)
from meddino.data.stored_values import value_range


def test_normalise__ct_is_clipped_and_normalised():
    hu = torch.tensor([[-3000, -1000, 0], [65, 1000, 3000]], dtype=torch.int16)
    result = normalise(hu, CTIntensity())
    assert result.shape == (3, 2, 3) and torch.equal(result[0], result[2])
    expected = [[(min(max(v, -1000), 1000) - 65.108) / 178.017 for v in row] for row in hu.tolist()]
    assert result[1].numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_normalise__mr_follows_each_volumes_own_range():
    stored = torch.tensor([[[0.0, 10, 20]], [[100, 300, 900]]])
    result = normalise(stored, MRIntensity(mean=0.5, std=0.25), torch.tensor([[0.0, 20], [100, 500]]))
    assert result.shape == (2, 3, 1, 3)
    for sample, units in enumerate([[0, 0.5, 1], [0, 0.5, 1]]):
        assert result[sample, 2, 0].tolist() == pytest.approx([(unit - 0.5) / 0.25 for unit in units])


def test_normalise__mr_does_not_depend_on_the_scanners_scale():
    stored = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 100.0, (1, 8, 8)).astype(np.float32))
    first = normalise(stored, MRIntensity(), torch.tensor([value_range("mr", stored.numpy())]))
    scaled = stored * 37 + 11
    second = normalise(scaled, MRIntensity(), torch.tensor([value_range("mr", scaled.numpy())]))
    assert torch.allclose(first, second, atol=1e-4)


def test_normalise_channels__rgb_by_each_channels_own_numbers():
    unit = torch.from_numpy(np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32))
    image = ImageIntensity()
    result = normalise_channels(unit, image)
    for channel in range(3):
        expected = (unit[:, channel] - image.mean[channel]) / image.std[channel]
        assert torch.allclose(result[:, channel], expected)
    grey = normalise_channels(unit[:, :1], image)
    assert grey.shape == (2, 3, 4, 5) and torch.allclose(grey[:, 0], result[:, 0])
    one = normalise_channels(unit, ImageIntensity(mean=(0.5,), std=(0.5,)))
    assert torch.allclose(one, (unit.mean(1, keepdim=True) - 0.5) / 0.5)


def test_normalise_channels__refuses_channels_that_fit_nothing():
    with pytest.raises(ConfigError, match="2 channels"):
        normalise_channels(torch.zeros(1, 2, 4, 4), ImageIntensity())
    with pytest.raises(ConfigError, match=r"2 channels.*3"):
        normalise_channels(torch.zeros(1, 2, 4, 4), MRIntensity())


def test_to_unit__clips_at_both_ends():
    values = torch.tensor([[[[-5, 0, 50, 100, 130]]]], dtype=torch.int16)
    assert to_unit(values, torch.tensor([[0.0, 100.0]])).flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_to_picture__ct_in_named_windows_and_others_by_their_range():
    hu = torch.tensor([[-1000, -160, 40, 240, 1000]], dtype=torch.int16)
    assert to_picture(hu, "ct").tolist() == [[0, 0, 128, 255, 255]]
    assert to_picture(hu, "ct", window="lung").tolist()[0][-1] == 255
    assert to_picture(hu, "ct", window=(40.0, 2080.0)).tolist()[0][0] == 0
    assert to_picture(hu, "mr", torch.tensor([-160.0, 240.0])).tolist() == [[0, 0, 128, 255, 255]]


def test_stretch_window__own_window_is_clipping():
    hu = torch.tensor([[[-2000.0, -200, 700, 1500]]])
    ct = CTIntensity()
    stretched = stretch_window(hu, torch.tensor([ct.hu_min]), torch.tensor([ct.hu_max]), ct)
    assert torch.allclose(stretched, hu.clamp(-1000, 1000))


def test_is_foreground__denser_than_air_or_brighter_than_dark():
    hu = torch.tensor([[-1000, -951, -940, 40]], dtype=torch.int16)
    assert is_foreground(hu, "ct").tolist() == [[False, False, True, True]]
    assert is_foreground(torch.tensor([[0, 1, 50]]), "mr", torch.tensor([0.0, 100.0])).tolist() == [[False, False, True]]
