"""Point-wise changes of each modality, drawn on the host and applied to batches on the device.

Each modality has a function that draws and one that applies: CT random windows in Hounsfield units, MR bias fields and gamma,
pictures brightness, contrast and colour. What is drawn is a row of numbers a view, which `meddino_pretrain.data.intensities`
carries along; `CHANGES` at the end says which functions are whose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from meddino.data.intensity import CTIntensity, Modality
from meddino.data.model_input import normalise, stretch_window
from meddino_pretrain.data.config import CTAugment, ImageAugment, MRAugment
from meddino_pretrain.data.distortions import between

CT_COLUMNS = 4  # window's lower end [HU], its upper end [HU], gamma, scale
MR_COLUMNS = 6  # gamma, the bias field's coefficients of x, y, xx, xy, yy
IMAGE_COLUMNS = 4  # factors of brightness, contrast and saturation, turn of the hue [turns]

# RGB <-> brightness and two axes of colour; a turn about the first is a change of hue (NTSC's YIQ).
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def draw_ct(config: CTAugment, contract: CTIntensity, rng: np.random.Generator, views: int) -> NDArray[np.float32]:
    """Draw windows, gamma and scale.

    Args:
        config: Chances and ranges.
        contract: Gives the window that is no random one.
        rng: The sample's own.
        views: Of the sample; row v is the same whatever their number.

    Returns:
        [views, 4]: lower and upper end of the window [HU], gamma, scale (1 where chance spares the sample).
    """
    draws = rng.random((views + 1, 4))
    gamma_chance, gamma_place, scale_chance, scale_place = draws[0]
    rows = draws[1:]
    contract_chance, level_place, width_place = (
        np.broadcast_to(column if config.window_per == "crop" else column[:1], (views,)) for column in rows.T[:3]
    )
    low, high = np.log(config.window_width_hu)
    width = np.exp(low + width_place * (high - low))
    level = config.window_level_hu[0] + level_place * (config.window_level_hu[1] - config.window_level_hu[0])
    own = contract_chance < config.window_contract_probability
    result = np.empty((views, CT_COLUMNS), dtype=np.float32)
    result[:, 0] = np.where(own, contract.hu_min, level - width / 2)
    result[:, 1] = np.where(own, contract.hu_max, level + width / 2)
    result[:, 2] = between(config.gamma_range, gamma_place) if gamma_chance < config.gamma_probability else 1.0
    result[:, 3] = between(config.scale_range, scale_place) if scale_chance < config.scale_probability else 1.0
    return result


def apply_ct(
    stored: Shaped[Tensor, "b h w"], rows: Float[Tensor, "b 4"], contract: CTIntensity, undistorted: bool = False
) -> Float[Tensor, "b c h w"]:
    """Turn a batch of views into model input: window, gamma, scale, then the contract's normalisation.

    Args:
        stored: Hounsfield units.
        rows: From `draw_ct`, on the host.
        contract: Normalisation and channels.
        undistorted: Keep the window but leave gamma and scale away.
    """
    # Which images chance struck is known on the host, so nothing waits for the device.
    curved, scaled = ([] if undistorted else _struck(rows[:, column], stored.device) for column in (2, 3))
    rows = rows.to(stored.device, non_blocking=True)
    lower, upper = rows[:, :2].unbind(1)
    gamma, scale = rows[:, 2:, None, None].unbind(1)
    images = stretch_window(stored.float(), lower, upper, contract)
    span = contract.hu_max - contract.hu_min
    for part in curved:
        images[part] = ((images[part] - contract.hu_min) / span).pow_(gamma[part]) * span + contract.hu_min
    for part in scaled:
        images[part] = (images[part] - contract.mean) * scale[part] + contract.mean
    return normalise(images, contract)


def _struck(factors: Float[Tensor, " b"], device: torch.device) -> list[slice]:
    """Return which images to pass over together: those with a factor other than 1.

    On a CPU one after the other, and none of the rest. On an accelerator all at once, where any has one: it would wait longer
    for a thousand small kernels than a factor of 1 costs it.
    """
    struck = torch.nonzero(factors != 1).flatten().tolist()
    if device.type == "cpu":
        return [slice(number, number + 1) for number in struck]
    return [slice(None)] * bool(struck)


def draw_mr(config: MRAugment, rng: np.random.Generator, views: int) -> NDArray[np.float32]:
    """Draw a gamma curve and a bias field for each view.

    Args:
        config: Chances and ranges.
        rng: The sample's own.
        views: Of the sample; row v is the same whatever their number.

    Returns:
        [views, 6]: gamma (1: none), then the field's coefficients (0: none).
    """
    draws = rng.random((views, MR_COLUMNS + 2))
    low, high = np.log(config.gamma_range)
    gamma = np.exp(low + draws[:, 2] * (high - low))
    field = (2 * draws[:, 3:] - 1) * config.bias_field_strength
    result = np.empty((views, MR_COLUMNS), dtype=np.float32)
    result[:, 0] = np.where(draws[:, 0] < config.gamma_probability, gamma, 1.0)
    result[:, 1:] = np.where(draws[:, 1:2] < config.bias_field_probability, field, 0.0)
    return result


def change_mr(unit: Float[Tensor, "b 1 h w"], rows: Float[Tensor, "b 6"]) -> Float[Tensor, "b 1 h w"]:
    """Apply gamma and a bias field to values in [0, 1].

    Args:
        unit: Of each view; 0 and 1 are its volume's percentiles.
        rows: From `draw_mr`, on the host.

    Source: the bias field is the exponential of a polynomial over the image (van Leemput et al. 1999, as in TorchIO, there of
    third order); here of second order over each view, and divided by its mean, so that it is no change of brightness.
    """
    rows = rows.to(unit.device, non_blocking=True)
    y = torch.linspace(-1, 1, unit.shape[-2], device=unit.device)[:, None].expand(unit.shape[-2:])
    x = torch.linspace(-1, 1, unit.shape[-1], device=unit.device)[None].expand(unit.shape[-2:])
    field = torch.einsum("bk,khw->bhw", rows[:, 1:], torch.stack([x, y, x * x, x * y, y * y])).exp_()[:, None]
    field = field / field.mean((-2, -1), keepdim=True)
    return (unit.pow(rows[:, 0].view(-1, 1, 1, 1)) * field).clamp_(0, 1)


def draw_image(config: ImageAugment, rng: np.random.Generator, views: int) -> NDArray[np.float32]:
    """Draw changes of brightness, contrast and colour for each view.

    Args:
        config: Chances and ranges.
        rng: The sample's own.
        views: Of the sample; row v is the same whatever their number.

    Returns:
        [views, 4]: factors of brightness, contrast and saturation (1: none), turn of the hue [turns] (0: none).
    """
    draws = rng.random((views, IMAGE_COLUMNS + 1))
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    change = (2 * draws[:, 1:] - 1) * spread
    result = np.where(draws[:, :1] < config.jitter_probability, change, 0.0)
    result[:, :3] += 1
    return result.astype(np.float32)


def change_image(unit: Float[Tensor, "b c h w"], rows: Float[Tensor, "b 4"]) -> Float[Tensor, "b c h w"]:
    """Apply brightness, contrast and colour to values in [0, 1].

    Args:
        unit: Grey (1 channel), or RGB.
        rows: From `draw_image`, on the host.

    Source: the colour jitter of SimCLR and DINO as in torchvision, in this order: brightness, contrast about the mean of the
    grey image, saturation and hue. Difference: hue is turned in YIQ, one matrix a view, not in HSV.
    """
    brightness, contrast, saturation, hue = rows.to(unit.device, non_blocking=True).view(-1, IMAGE_COLUMNS, 1, 1, 1).unbind(1)
    images = (unit * brightness).clamp_(0, 1)
    if unit.shape[1] == 1:
        mean = images.mean((-3, -2, -1), keepdim=True)
        return ((images - mean) * contrast + mean).clamp_(0, 1)
    # Turned round on the host: an accelerator would be waited for, to hear whether it can be.
    to_yiq, to_rgb = (matrix.to(unit.device) for matrix in (torch.tensor(_YIQ), torch.linalg.inv(torch.tensor(_YIQ))))
    yiq = torch.einsum("kc,bchw->bkhw", to_yiq, images)
    mean = yiq[:, :1].mean((-2, -1), keepdim=True)
    # Brightness about its mean; colours by the same factor, and turned.
    luma = (yiq[:, :1] - mean) * contrast + mean
    angle = 2 * torch.pi * hue[:, 0]
    colour = yiq[:, 1:] * contrast * saturation
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos * colour[:, 0] - sin * colour[:, 1], sin * colour[:, 0] + cos * colour[:, 1]], dim=1)
    rgb = torch.einsum("ck,bkhw->bchw", to_rgb, torch.cat([luma, turned], dim=1))
    return rgb.clamp_(0, 1)


@dataclass(frozen=True)
class Changes:
    """What chance does to the intensities of a modality.

    Attributes:
        columns: Numbers that are drawn for a view.
        draw: Its section of `AugmentConfig`, the contract, the sample's own generator, the views -> [views, columns].
        chosen: A window of CT [HU] and a change of contrast -> the numbers of a view of which nothing else is changed.
        change: Values in [0, 1] and what was drawn -> values in [0, 1]; None for CT, whose windows come first (`apply_ct`).
    """

    columns: int
    draw: Callable[[Any, Any, np.random.Generator, int], NDArray[np.float32]]
    chosen: Callable[[tuple[float, float], float], tuple[float, ...]]
    change: Callable[[Tensor, Tensor], Tensor] | None


CHANGES: dict[Modality, Changes] = {
    "ct": Changes(CT_COLUMNS, draw_ct, lambda window, gamma: (*window, gamma, 1.0), None),
    "mr": Changes(
        MR_COLUMNS,
        lambda config, _contract, rng, views: draw_mr(config, rng, views),
        lambda _window, gamma: (gamma, 0.0, 0.0, 0.0, 0.0, 0.0),
        change_mr,
    ),
    "image": Changes(
        IMAGE_COLUMNS,
        lambda config, _contract, rng, views: draw_image(config, rng, views),
        lambda _window, contrast: (1.0, contrast, 1.0, 0.0),
        change_image,
    ),
}
