"""Patch embedding: the matrix-product form and the convolution agree."""

import pytest
import torch

from meddino.layers.patch_embedding import PatchEmbedding


def test_forward__equals_the_convolution():
    embedding = PatchEmbedding(4, 3, 10)
    images = torch.randn(2, 3, 8, 12)
    expected = embedding.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 1, 8, 8), (1, 3, 0, 8)])
def test_forward__refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="C = 3 and H, W multiples of its patch size 4"):
        PatchEmbedding(4, 3, 10)(torch.zeros(shape))
