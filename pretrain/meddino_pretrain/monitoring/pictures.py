"""What a backbone sees in fixed slices, as pictures for people."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from meddino.core.device import Machine
from meddino.core.html_charts import png
from meddino.models.patch_maps import cosine_map, patch_pca_images
from meddino_pretrain.monitoring.fixed_slices import PICTURED, FixedSlices

# Where cosine similarities are taken from, as shares of the slice's height and width: middle, right lung, spine.
_POINTS = ((0.5, 0.5), (0.4, 0.3), (0.7, 0.5))
_TILE_PX = 224


@torch.no_grad()
def probe_pictures(see: Callable[[Tensor], Tensor | None], fixed: FixedSlices, machine: Machine) -> dict[str, bytes]:
    """Draw fixed slices, their patch tokens as colours, and cosine-similarity maps from a few points.

    Args:
        see: Returns the patch map of images, or None.
        fixed: The slices; those of `pictured` are drawn where there are any.
        machine: Where images go.

    Returns:
        PNG files: "pca" (upper row slices, lower row the first three principal components of the body's patch tokens) and
        "similarity" (a row a point: similarity of each patch to the marked one, black 0 and below, white 1). None where
        there are no patch tokens.
    """

    def seen(slices: FixedSlices) -> Tensor | None:
        with machine.autocast():
            return see(slices.first_view[:PICTURED].to(machine.device, machine.weight_dtype))

    drawn = fixed.pictured or fixed
    try:
        patch_map = seen(drawn)
    except ValueError:  # a network that takes images of one size only
        drawn, patch_map = fixed, seen(fixed)
    if patch_map is None:
        return {}
    maps = patch_map.float().contiguous().cpu()
    grey = drawn.grey[:PICTURED]
    share = torch.nn.functional.interpolate(drawn.body[:PICTURED, None].float(), size=maps.shape[2:], mode="area")
    slices = [np.repeat(picture.numpy()[..., None], 3, axis=2) for picture in grey]
    colours = patch_pca_images(list(maps), masks=list(share[:, 0] >= 0.5))
    rows = [[_tile(picture) for picture in slices], [_tile(picture) for picture in colours]]
    similarity = [[_tile(picture) for picture in slices]]
    similarity += [[_tile(_similarity_picture(tokens, point)) for tokens in maps] for point in _POINTS]
    return {"pca": png(_grid(rows)), "similarity": png(_grid(similarity))}


def _similarity_picture(tokens: Tensor, point: tuple[float, float]) -> NDArray[np.uint8]:
    row, col = (min(int(share * side), side - 1) for share, side in zip(point, tokens.shape[1:], strict=True))
    grey = (cosine_map(tokens, row, col).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture[row, col] = (255, 64, 64)
    return picture


def _tile(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((_TILE_PX, _TILE_PX), Image.Resampling.NEAREST))


def _grid(rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    return np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
