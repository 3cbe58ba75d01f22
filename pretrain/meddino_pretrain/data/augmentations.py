"""CT augmentations: spatial ones once on the slice before it is cropped, point-wise ones batched on the device."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.seeds import numpy_rng
from meddino.data.contract import InputContract
from meddino.data.model_input import normalise, stretch_window
from meddino_pretrain.data.config import AugmentConfig

INTENSITY_COLUMNS = 4  # window's lower end [HU], its upper end [HU], gamma, scale


def distort_slice(hu: NDArray[np.int16], config: AugmentConfig, seed: int, number: int) -> NDArray[np.int16]:
    """Apply low resolution, smoothing and noise to a slice, each by chance.

    Args:
        hu: int16 [rows, cols] in Hounsfield units; never changed in place.
        config: Chances and strengths.
        seed: The stage's seed.
        number: Global sample number.

    Returns:
        `hu` itself if chance spared it, else a new int16 array of the same shape.
    """
    rng = numpy_rng(seed, "distort", number)
    chances, strengths = rng.random(3), rng.random(3)
    noisy, smooth, coarse = chances < (
        config.noise_probability,
        config.smoothing_probability,
        config.low_resolution_probability,
    )
    if not (noisy or smooth or coarse):
        return hu
    image = torch.from_numpy(hu.astype(np.float32))
    if coarse:
        image = _coarsen(image, _between(config.low_resolution_zoom, strengths[2]))
    if smooth:
        image = _smooth(image, _between(config.smoothing_sigma_px, strengths[1]))
    if noisy:
        noise = torch.from_numpy(rng.standard_normal(hu.shape, dtype=np.float32))
        image = image.add(noise, alpha=_between(config.noise_sd_hu, strengths[0]))
    limits = torch.iinfo(torch.int16)
    distorted: NDArray[np.int16] = image.round_().clamp_(limits.min, limits.max).to(torch.int16).numpy()
    return distorted


def draw_intensity(config: AugmentConfig, contract: InputContract, seed: int, number: int, crops: int) -> NDArray[np.float32]:
    """Draw what happens to the intensities of each crop of a sample.

    Args:
        config: Chances and ranges.
        contract: Gives the window that is no random one.
        seed: The stage's seed.
        number: Global sample number.
        crops: Crops of the sample; row c is the same whatever their number.

    Returns:
        float32 [crops, 4]: lower and upper end of the HU window, gamma, scale (1 where chance spares the sample).
    """
    draws = numpy_rng(seed, "intensity", number).random((crops + 1, 4))
    gamma_chance, gamma_place, scale_chance, scale_place = draws[0]
    rows = draws[1:]
    contract_chance, level_place, width_place = (
        np.broadcast_to(column if config.window_per == "crop" else column[:1], (crops,)) for column in rows.T[:3]
    )
    low, high = np.log(config.window_width_hu)
    width = np.exp(low + width_place * (high - low))
    level = config.window_level_hu[0] + level_place * (config.window_level_hu[1] - config.window_level_hu[0])
    own = contract_chance < config.window_contract_probability
    result = np.empty((crops, INTENSITY_COLUMNS), dtype=np.float32)
    result[:, 0] = np.where(own, contract.hu_min, level - width / 2)
    result[:, 1] = np.where(own, contract.hu_max, level + width / 2)
    result[:, 2] = _between(config.gamma_range, gamma_place) if gamma_chance < config.gamma_probability else 1.0
    result[:, 3] = _between(config.scale_range, scale_place) if scale_chance < config.scale_probability else 1.0
    return result


def apply_intensity(
    hu: Int16[Tensor, "b h w"] | Float[Tensor, "b h w"],
    intensity: Float[Tensor, "b 4"],
    contract: InputContract,
    undistorted: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Turn a batch of crops into model input: window, gamma, scale, then the contract's normalisation.

    Args:
        hu: Hounsfield units.
        intensity: From `draw_intensity`, one row an image; on the host.
        contract: Normalisation and channels.
        undistorted: Keep the window but leave gamma and scale away: what the Gram teacher sees.
    """
    # Which images chance struck is known on the host: no pass over the others, and nothing waits for the device.
    curved = [] if undistorted else torch.nonzero(intensity[:, 2] != 1).flatten().tolist()
    scaled = [] if undistorted else torch.nonzero(intensity[:, 3] != 1).flatten().tolist()
    intensity = intensity.to(hu.device, non_blocking=True)
    lower, upper, gamma, scale = intensity.unbind(1)
    images = stretch_window(hu.float(), lower, upper, contract)
    span = contract.hu_max - contract.hu_min
    for i in curved:
        images[i] = ((images[i] - contract.hu_min) / span).pow_(gamma[i]) * span + contract.hu_min
    for i in scaled:
        images[i] = (images[i] - contract.mean) * scale[i] + contract.mean
    return normalise(images, contract)


def _between(limits: tuple[float, float], place: float) -> float:
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
