"""Low resolution, smoothing and noise: what chance does to a stored slice before it is cropped."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.seeds import numpy_rng
from meddino_pretrain.data.config import Distortions


def distort_slice(stored: NDArray[Any], config: Distortions, noise_unit: float, seed: int, number: int) -> NDArray[Any]:
    """Apply low resolution, smoothing and noise to a slice, each by chance.

    Args:
        stored: [rows, cols], or [rows, cols, 3] of a colour picture; never changed in place.
        config: Chances and strengths.
        noise_unit: What a noise of standard deviation 1 is in stored values.
        seed: The stage's seed.
        number: Global sample number.

    Returns:
        `stored` itself if chance spared it, else a new array of the same shape and type.
    """
    rng = numpy_rng(seed, "distort", number)
    chances, strengths = rng.random(3), rng.random(3)
    noisy, smooth, coarse = chances < (
        config.noise_probability,
        config.smoothing_probability,
        config.low_resolution_probability,
    )
    if not (noisy or smooth or coarse):
        return stored
    image = torch.from_numpy(stored.astype(np.float32))
    # Channels last as they are stored; each is an image of its own.
    planes = [image] if image.ndim == 2 else list(image.unbind(-1))
    if coarse:
        planes = [_coarsen(plane, between(config.low_resolution_zoom, strengths[2])) for plane in planes]
    if smooth:
        planes = [_smooth(plane, between(config.smoothing_sigma_px, strengths[1])) for plane in planes]
    image = planes[0] if image.ndim == 2 else torch.stack(planes, dim=-1)
    if noisy:
        noise = torch.from_numpy(rng.standard_normal(stored.shape, dtype=np.float32))
        image = image.add(noise, alpha=between(config.noise_range, strengths[0]) * noise_unit)
    values = image.numpy()
    if stored.dtype.kind == "f":
        return values.astype(stored.dtype)
    limits = np.iinfo(stored.dtype)
    return np.clip(np.rint(values, out=values), limits.min, limits.max, out=values).astype(stored.dtype)


def between(limits: tuple[float, float], place: float) -> float:
    """Return the value at a place [0-1] between two limits."""
    return float(limits[0] + place * (limits[1] - limits[0]))


def _coarsen(image: Float[Tensor, "h w"], zoom: float) -> Float[Tensor, "h w"]:
    small = tuple(max(1, round(side * zoom)) for side in image.shape)
    shrunk = F.interpolate(image[None, None], size=small, mode="bilinear", align_corners=False, antialias=True)
    # Antialiasing changes nothing where an image grows, but that kernel of torch's is twice as fast.
    return F.interpolate(shrunk, size=image.shape, mode="bicubic", align_corners=False, antialias=True)[0, 0]


def _smooth(image: Float[Tensor, "h w"], sigma_px: float) -> Float[Tensor, "h w"]:
    # Shifted sums: for kernels this short ten times as fast as SciPy's filter and six times as fast as a convolution.
    radius = int(4 * sigma_px + 0.5)
    weights = [math.exp(-0.5 * (offset / sigma_px) ** 2) for offset in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (0, 1):
        padding = (0, 0, radius, radius) if dim == 0 else (radius, radius, 0, 0)
        padded = F.pad(image[None, None], padding, mode="replicate")[0, 0]
        size = image.shape[dim]
        image = padded.narrow(dim, radius, size) * (weights[0] / total)
        for offset in range(1, radius + 1):
            pair = padded.narrow(dim, radius - offset, size) + padded.narrow(dim, radius + offset, size)
            image.add_(pair, alpha=weights[offset] / total)
    return image
