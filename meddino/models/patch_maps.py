"""Patch tokens for people to look at: as colours, and by their likeness to one patch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.errors import ConfigError
from meddino.models.backbone import BackboneOutput


def patch_pca_images(
    maps: Sequence[Float[Tensor, "dim _h _w"]], upscale: int = 1, masks: Sequence[Bool[Tensor, "_h _w"]] | None = None
) -> list[NDArray[np.uint8]]:
    """Colour patch maps by their first three principal components, fitted over all of them together.

    Args:
        maps: Patch tokens as maps [D, h, w]; sizes may differ, D may not.
        upscale: Every patch becomes a square of this many pixels.
        masks: True where a patch counts, such as the body; the others are black and fit nothing. None counts all; so do
            masks that hold fewer than four patches in all.

    Returns:
        One uint8 picture [h * upscale, w * upscale, 3] a map. Each component is stretched from its 2nd to its 98th
        percentile. The sign of a component, which is arbitrary, is set so that its largest entry is positive.
    """
    flat = [tokens.detach().float().cpu().flatten(1).T for tokens in maps]
    inside = [torch.ones(len(rows), dtype=torch.bool) for rows in flat]
    if masks is not None and sum(int(mask.sum()) for mask in masks) >= 4:
        inside = [mask.cpu().flatten() for mask in masks]
    everything = torch.cat([rows[mask] for rows, mask in zip(flat, inside, strict=True)]).double()
    mean = everything.mean(0)
    centred = everything - mean
    # The eigenvectors of the D x D covariance: exact, and small beside the number of patches.
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, -3:].flip(1)
    largest = components.abs().argmax(0)
    components = components * components[largest, torch.arange(components.shape[1])].sign()
    scores = centred @ components
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    pictures = []
    for tokens, rows, mask in zip(maps, flat, inside, strict=True):
        unit = (((rows.double() - mean) @ components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        unit = unit * mask[:, None]
        grid = (unit * 255).round().to(torch.uint8).reshape(*tokens.shape[1:], -1).numpy()
        pictures.append(np.repeat(np.repeat(grid, upscale, axis=0), upscale, axis=1))
    return pictures


def share_of_patch(mask: Bool[Tensor, "*batch height width"], patch_size: int) -> Float[Tensor, "*batch h w"]:
    """Return the share of each patch's pixels that a mask holds; sides are multiples of `patch_size`."""
    rows, columns = mask.shape[-2] // patch_size, mask.shape[-1] // patch_size
    return mask.float().reshape(*mask.shape[:-2], rows, patch_size, columns, patch_size).mean((-3, -1))


def cosine_map(tokens: Float[Tensor, "dim h w"], row: int, column: int) -> Float[Tensor, "h w"]:
    """Return the cosine similarity of every patch to the one at [row, column]."""
    return similarity(tokens.movedim(0, -1), (row, column))


def pca(tokens: Any, body: Bool[Tensor, "*batch h w"] | None = None, upscale: int = 1) -> NDArray[np.uint8]:
    """Colour patch tokens by their first three principal components, fitted over all of them together.

    Args:
        tokens: `VolumeTokens`, whose patches of the body alone are coloured; a `BackboneOutput`; or a tensor [..., h, w, D].
        body: True where a patch counts; the others are black. By default that of `VolumeTokens`, else all.
        upscale: Every patch becomes a square of this many pixels.

    Returns:
        uint8 [..., h * upscale, w * upscale, 3]; see `patch_pca_images`.
    """
    body = getattr(tokens, "body", None) if body is None else body
    values = _token_tensor(tokens)
    maps = values.reshape(-1, *values.shape[-3:]).movedim(-1, 1)
    masks = None if body is None else list(body.reshape(-1, *body.shape[-2:]))
    pictures = np.stack(patch_pca_images(list(maps), upscale, masks))
    return pictures.reshape(*values.shape[:-3], *pictures.shape[1:])


def similarity(tokens: Any, to: Sequence[int] | Float[Tensor, " dim"]) -> Float[Tensor, "*batch h w"]:
    """Return the cosine similarity of every patch to one.

    Args:
        tokens: As in `pca`.
        to: Where the one is: (slice, row, column) of a volume, (row, column) of one map; or a vector [D], such as the mean
            over patches of an organ in another volume.

    Raises:
        ConfigError: There is no such patch, or the vector has another width.
    """
    values = _token_tensor(tokens).detach()
    if isinstance(to, Tensor):
        vector = to.detach().to(values)
        if vector.shape != values.shape[-1:]:
            raise ConfigError(f"a vector of {list(vector.shape)}; the tokens are {values.shape[-1]} wide")
    else:
        if len(to) != values.ndim - 1 or any(not 0 <= at < size for at, size in zip(to, values.shape, strict=False)):
            raise ConfigError(f"patch {tuple(to)} asked for; patches are {list(values.shape[:-1])}, from 0")
        vector = values[tuple(to)]
    return F.normalize(values, dim=-1) @ F.normalize(vector, dim=0)


def _token_tensor(tokens: Any) -> Float[Tensor, "*batch h w dim"]:
    if isinstance(tokens, BackboneOutput):
        return tokens.patch_map.movedim(1, -1)
    values: Tensor = getattr(tokens, "tokens", tokens)
    if not isinstance(values, Tensor) or values.ndim < 3:
        what = f"{list(values.shape)}" if isinstance(values, Tensor) else type(tokens).__name__
        raise ConfigError(f"tokens are {what}; give [..., h, w, D], VolumeTokens or a model's output")
    return values
