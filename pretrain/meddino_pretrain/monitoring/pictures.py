"""What a backbone sees in fixed slices, as pictures for people."""

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from meddino.core.device import Machine
from meddino.models.patch_pca import patch_pca_images
from meddino_pretrain.monitoring.fixed_slices import FixedSlices

# Where cosine similarities are taken from, as shares of the slice's height and width: middle, right lung, spine.
_POINTS = ((0.5, 0.5), (0.4, 0.3), (0.7, 0.5))
_TILE_PX = 160


@torch.no_grad()
def probe_pictures(
    see: Callable[[Tensor], Tensor | None], fixed: FixedSlices, machine: Machine, count: int = 6
) -> dict[str, bytes]:
    """Draw fixed slices, their patch tokens as colours, and cosine-similarity maps from a few points.

    Args:
        see: Returns the patch map of images, or None.
        fixed: The slices.
        machine: Where images go.
        count: How many slices are drawn, from all over the set.

    Returns:
        PNG files: "pca" (upper row slices, lower row the first three principal components of their patch tokens) and
        "similarity" (a row a point: similarity of each patch to the marked one, black 0 and below, white 1). None where
        there are no patch tokens.
    """
    chosen = np.linspace(0, len(fixed) - 1, min(count, len(fixed))).round().astype(int).tolist()
    with machine.autocast():
        patch_map = see(fixed.first_view[chosen].to(machine.device, machine.weight_dtype))
    if patch_map is None:
        return {}
    maps = patch_map.float().contiguous().cpu()
    slices = [np.repeat(fixed.grey[index].numpy()[..., None], 3, axis=2) for index in chosen]
    rows = [[_tile(picture) for picture in slices], [_tile(picture) for picture in patch_pca_images(list(maps))]]
    similarity = [[_tile(picture) for picture in slices]]
    similarity += [[_tile(_similarity_picture(tokens, point)) for tokens in maps] for point in _POINTS]
    return {"pca": _png(_grid(rows)), "similarity": _png(_grid(similarity))}


def cosine_map(tokens: Float[Tensor, "d h w"], row: int, col: int) -> Float[Tensor, "h w"]:
    """Return the cosine similarity of every patch to the one at [row, col]."""
    unit = F.normalize(tokens, dim=0)
    return torch.einsum("dhw,d->hw", unit, unit[:, row, col])


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


def _png(picture: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()
