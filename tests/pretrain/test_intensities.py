"""Slices of any modality in one batch: each is normalised by its own contract."""

import numpy as np
import pytest
import torch
from meddino_pretrain.data.augmentations import apply_ct, draw_ct
from meddino_pretrain.data.config import AugmentConfig
from meddino_pretrain.data.intensities import COLUMNS, Intensities, StoredSlice

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.data.intensity import CTIntensity, ImageIntensity, MRIntensity
from meddino.data.model_input import normalise, normalise_channels

CT, MR, IMAGE = CTIntensity(), MRIntensity(), ImageIntensity()
ALL = Intensities((CT, MR, IMAGE))


def slices() -> dict[str, StoredSlice]:
    rng = np.random.default_rng(0)
    return {
        "ct": StoredSlice(rng.integers(-1200, 1500, (12, 10)).astype(np.int16)),
        "mr": StoredSlice(rng.gamma(2, 150, (12, 10)).astype(np.float32), "mr", (3.0, 700.0)),
        "grey": StoredSlice(rng.integers(0, 65536, (12, 10)).astype(np.uint16), "image", (0.0, 65535.0)),
        "rgb": StoredSlice(rng.integers(0, 256, (12, 10, 3)).astype(np.uint8), "image", (0.0, 255.0)),
    }


def host(intensities: Intensities, stored: StoredSlice) -> torch.Tensor:
    values = torch.from_numpy(stored.values.astype(np.float32))
    return intensities.on_host(values if values.ndim == 2 else values.permute(2, 0, 1))


def test_apply__each_sample_of_a_mixed_batch_by_its_own_contract():
    given = slices()
    values = torch.stack([host(ALL, stored) for stored in given.values()])
    rows = torch.from_numpy(np.concatenate([ALL.plain(stored) for stored in given.values()]))
    images = ALL.apply(values, rows)
    assert images.shape == (4, 3, 12, 10)
    ct, mr, grey, rgb = (torch.from_numpy(stored.values.astype(np.float32)) for stored in given.values())
    assert torch.allclose(images[0], normalise(ct, CT), atol=1e-5)
    assert torch.allclose(images[1], normalise(mr, MR, torch.tensor([3.0, 700.0])), atol=1e-5)
    assert torch.allclose(images[2], normalise_channels(grey[None] / 65535, IMAGE), atol=1e-5)
    assert torch.allclose(images[3], normalise_channels(rgb.permute(2, 0, 1) / 255, IMAGE), atol=1e-5)


def test_apply__samples_do_not_depend_on_their_neighbours():
    given = slices()
    values = torch.stack([host(ALL, stored) for stored in given.values()])
    rows = torch.from_numpy(np.concatenate([ALL.draw(stored, 0, n, 1) for n, stored in enumerate(given.values())]))
    together = ALL.apply(values, rows)
    for i in range(4):
        assert torch.allclose(together[i], ALL.apply(values[i : i + 1], rows[i : i + 1])[0], atol=1e-6)


def test_apply__undistorted_leaves_chance_away():
    given = slices()
    for name in ("mr", "rgb"):
        stored = given[name]
        values = host(ALL, stored)[None]
        drawn, plain = (torch.from_numpy(rows) for rows in (ALL.draw(stored, 0, 1, 1), ALL.plain(stored)))
        assert torch.equal(ALL.apply(values, drawn, undistorted=True), ALL.apply(values, plain, undistorted=True))


def test_ct_alone__stays_int16_and_draws_what_it_drew():
    ct = Intensities((CT,))
    stored = slices()["ct"]
    assert ct.empty(2, 3, 8).dtype == torch.int16 and ct.empty(2, 3, 8).shape == (2, 3, 8, 8)
    rows = ct.draw(stored, 5, 7, 6)
    own = draw_ct(AugmentConfig().ct, CT, numpy_rng(5, "intensity", 7), 6)
    assert rows.shape == (6, COLUMNS) and np.array_equal(rows[:, 3:7], own)
    values = torch.from_numpy(stored.values)[None].expand(6, -1, -1)
    assert torch.equal(ct.apply(values, torch.from_numpy(rows)), apply_ct(values, torch.from_numpy(own), CT))


def test_host__layout_follows_the_contracts():
    grey, rgb = torch.rand(4, 5), torch.rand(3, 4, 5)
    assert ALL.empty(2, 3, 8).shape == (2, 3, 3, 8, 8) and ALL.on_host(grey).shape == ALL.on_host(rgb).shape == (3, 4, 5)
    one = Intensities((ImageIntensity(mean=(0.5,), std=(0.5,)),))
    assert one.empty(2, 3, 8).shape == (2, 3, 8, 8) and torch.equal(one.on_host(rgb), rgb.mean(0))


def test_contract__a_modality_without_one_is_refused():
    with pytest.raises(ConfigError, match=r"'mr'.*ct, image"):
        Intensities((CT, IMAGE)).check(["ct", "mr"])
    ALL.check(["mr", "image"])


def test_check__a_modality_without_a_contract_is_named():
    with pytest.raises(ConfigError, match="modality 'image', the recipe has contracts for ct, mr: add one to other_contracts"):
        Intensities((CT, MR)).check(["ct", "image"])
