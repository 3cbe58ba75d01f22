"""Images to patch tokens."""

import math

from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """One linear map of every patch, written as a strided convolution (the official name and shape of the weight)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Draw weights uniformly within one over the square root of the number of inputs."""
        bound = 1 / math.sqrt(self.proj.in_channels * self.patch_size**2)
        assert self.proj.bias is not None  # made with one in __init__
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches dim"]:
        """Embed the patches, row by row.

        Raises:
            ValueError: If a side is no multiple of the patch size, or the channels differ from those built for.
        """
        size, (_, channels, height, width) = self.patch_size, images.shape
        if height % size or width % size or not height or not width or channels != self.proj.in_channels:
            raise ValueError(
                f"images are [B, C, H, W] = {list(images.shape)}; this model needs C = {self.proj.in_channels} and H, W "
                f"multiples of its patch size {size}"
            )
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).transpose(1, 2)
