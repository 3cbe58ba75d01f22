"""Patch tokens as colours: what a backbone tells apart, for people to look at."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


def patch_pca_images(maps: Sequence[Float[Tensor, "dim _h _w"]], upscale: int = 1) -> list[NDArray[np.uint8]]:
    """Colour patch maps by their first three principal components, fitted over all of them together.

    Args:
        maps: Patch tokens as maps [D, h, w]; sizes may differ, D may not.
        upscale: Every patch becomes a square of this many pixels.

    Returns:
        One uint8 picture [h * upscale, w * upscale, 3] a map. Each component is stretched from its 2nd to its 98th
        percentile. The sign of a component, which is arbitrary, is set so that its largest entry is positive.
    """
    flat = [tokens.detach().float().cpu().flatten(1).T for tokens in maps]
    everything = torch.cat(flat).double()
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
    for tokens, rows in zip(maps, flat, strict=True):
        unit = (((rows.double() - mean) @ components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        grid = (unit * 255).round().to(torch.uint8).reshape(*tokens.shape[1:], -1).numpy()
        pictures.append(np.repeat(np.repeat(grid, upscale, axis=0), upscale, axis=1))
    return pictures
