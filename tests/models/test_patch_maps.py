import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from meddino.models.patch_maps import cosine_map, patch_pca_images


def test_patch_pca_images__components_equal_scikit_learn():
    tokens = torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(12, 0, -1).view(12, 1, 1)
    (picture,) = patch_pca_images([tokens])
    scores = PCA(3).fit_transform(tokens.flatten(1).T.numpy())
    for channel in range(3):
        correlation = np.corrcoef(picture[..., channel].ravel(), scores[:, channel])[0, 1]
        assert abs(correlation) > 0.99  # 8 bits and clipped tails keep it from 1


def test_patch_pca_images__two_maps_share_their_colours():
    left = torch.zeros(4, 3, 3)
    left[0, :, 1:] = 5
    left += 0.01 * torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
    first, second = patch_pca_images([left, left[:, :2]], upscale=4)
    assert first.shape == (12, 12, 3)
    assert second.shape == (8, 12, 3)
    assert np.array_equal(first[:8], second)


def test_patch_pca_images__constant_map_gives_a_picture():
    (picture,) = patch_pca_images([torch.ones(4, 2, 2)])
    assert picture.shape == (2, 2, 3)


def test_cosine_map__equals_a_slow_loop():
    tokens = np.random.default_rng(0).normal(size=(5, 3, 4))
    result = cosine_map(torch.from_numpy(tokens), 2, 1)
    mark = tokens[:, 2, 1]
    for y in range(3):
        for x in range(4):
            a = tokens[:, y, x]
            assert result[y, x].item() == pytest.approx(a @ mark / np.linalg.norm(a) / np.linalg.norm(mark))
