"""Block masks and how they are spread over a step."""

import numpy as np
import pytest
import torch
from meddino_pretrain.methods.dinov3.config import MaskingConfig
from meddino_pretrain.methods.dinov3.masking import block_mask, masked_counts, masks_for_crops
from meddino_pretrain.methods.dinov3.views import mask_extras
from pydantic import ValidationError

CONFIG = MaskingConfig()


@pytest.mark.parametrize("grid", [(16, 16), (14, 9), (2, 3), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_block_mask__has_exactly_the_count(grid, share):
    count = int(share * grid[0] * grid[1])
    for seed in range(20):
        mask = block_mask(CONFIG, np.random.default_rng(seed), grid, count)
        assert mask.shape == grid and mask.sum() == count


def neighbours(mask: np.ndarray) -> float:
    """Share of the masked patches' right and lower neighbours that are masked too."""
    pairs = [(mask[:, :-1], mask[:, 1:]), (mask[:-1], mask[1:])]
    return sum((a & b).sum() for a, b in pairs) / sum(a.sum() for a, _ in pairs)


def test_block_mask__is_made_of_blocks():
    masks = [block_mask(CONFIG, np.random.default_rng(seed), (16, 16), 80) for seed in range(200)]
    assert np.mean([neighbours(mask) for mask in masks]) > 0.6  # single patches at random: 80 / 256 = 0.31
    coverage = np.mean(masks, axis=0)
    assert coverage.min() > 0.01 and coverage.mean() == pytest.approx(80 / 256)  # every place gets its turn


@pytest.mark.parametrize("step", [0, 5])
def test_masked_counts__half_the_crops_with_ratios_spread_evenly(step):
    counts = masked_counts(CONFIG, 3, step, crops=20, patches=196)
    expected = [0] * 10 + [int(196 * (0.1 + 0.4 * (i + 1) / 10)) for i in range(10)]
    assert sorted(counts.tolist()) == sorted(expected)
    assert counts.tolist() != masked_counts(CONFIG, 3, step + 1, 20, 196).tolist()


def test_masked_counts__bounds():
    assert masked_counts(MaskingConfig(probability=0.0), 0, 0, 8, 16).sum() == 0
    assert (masked_counts(MaskingConfig(probability=1.0, ratio=(0.01, 0.01)), 0, 0, 8, 16) == 1).all()  # never masked by 0


def test_masks_for_crops__each_sample_has_its_own_mask_whoever_asks():
    whole = masks_for_crops(CONFIG, 1, 4, 6, range(6), (8, 8), 2)
    counts = masked_counts(CONFIG, 1, 4, 12, 64)
    assert whole.shape == (12, 64) and whole.sum(axis=1).tolist() == counts.tolist()
    part = masks_for_crops(CONFIG, 1, 4, 6, range(2, 5), (8, 8), 2)
    for crop in range(2):
        for i, place in enumerate(range(2, 5)):
            assert np.array_equal(part[crop * 3 + i], whole[crop * 6 + place])


def test_masking_config__refuses_a_falling_ratio():
    with pytest.raises(ValidationError, match=r"ratio \[0.5, 0.1\] must ascend"):
        MaskingConfig(ratio=(0.5, 0.1))


def test_mask_indices__and_weights_follow_the_masks():
    masks = masks_for_crops(CONFIG, 1, 4, 6, range(6), (8, 8), 2)
    indices, weights = [], []
    for row, mask in enumerate(masks):
        for patch, hidden in enumerate(mask):
            if hidden:
                indices.append(row * len(mask) + patch)
                weights.append(1 / mask.sum())
    found = mask_extras(torch.from_numpy(masks))
    assert found["mask_indices"].tolist() == indices
    assert np.allclose(found["mask_weights"], weights)
    assert found["mask_weights"].sum().item() == pytest.approx(int(masks.any(axis=1).sum()))
