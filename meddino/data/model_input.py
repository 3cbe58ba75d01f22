"""What each modality's stored values become: model input, pictures for people. Settings are in `meddino.data.intensity`."""

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from meddino.core.errors import ConfigError
from meddino.data.intensity import (
    CT_WINDOWS_HU,
    MEMBERS,
    BrightnessIntensity,
    CTIntensity,
    Intensity,
    Modality,
    Window,
)

_AIR_HU = -950  # denser is body, or what lies beside it
_DARK = 0.04  # share of an MR's or a picture's range; below it is background


def normalise(
    stored: Shaped[Tensor, "*batch h w"], intensity: Intensity, value_range: Float[Tensor, "*#batch 2"] | None = None
) -> Float[Tensor, "*batch c h w"]:
    """Turn stored grey values into model input: clip, normalise, repeat over a new channel axis.

    Args:
        stored: Values as the corpus or a file holds them.
        intensity: The model's input contract.
        value_range: Stored values that become 0 and 1 where the modality's units are arbitrary, of
            `stored_values.value_range`. None where values are in [0, 1] already, or in Hounsfield units.
    """
    if isinstance(intensity, CTIntensity):
        return normalise_channels(stored.float().clamp(*intensity.shown_range).unsqueeze(-3), intensity)
    unit = stored.float() if value_range is None else to_unit(stored.unsqueeze(-3), value_range).squeeze(-3)
    return normalise_channels(unit.clamp(0, 1).unsqueeze(-3), intensity)


def normalise_channels(values: Float[Tensor, "*batch c h w"], intensity: Intensity) -> Float[Tensor, "*batch c2 h w"]:
    """Normalise values that are clipped already, and bring their channels to the contract's.

    Args:
        values: Hounsfield units, or values in [0, 1]; one channel, or RGB for a contract of brightness.
        intensity: The model's input contract.

    Raises:
        ConfigError: The channels fit neither one nor the contract's.
    """
    channels = values.shape[-3]
    if isinstance(intensity, BrightnessIntensity):
        if channels not in (1, 3):
            raise ConfigError(f"{channels} channels come in; a picture is grey (1) or RGB (3)")
        if intensity.channels == 1 and channels == 3:
            values = values.mean(-3, keepdim=True)
        mean = torch.tensor(intensity.mean, device=values.device).view(-1, 1, 1)
        std = torch.tensor(intensity.std, device=values.device).view(-1, 1, 1)
        return (values - mean) / std
    if channels == 1:
        return ((values - intensity.mean) / intensity.std).repeat_interleave(intensity.channels, dim=-3)
    if channels != intensity.channels:
        raise ConfigError(f"{channels} channels come in; the model's contract takes 1, or exactly {intensity.channels}")
    return (values - intensity.mean) / intensity.std


def to_unit(values: Shaped[Tensor, "*batch c h w"], value_range: Float[Tensor, "*#batch 2"]) -> Float[Tensor, "*batch c h w"]:
    """Bring values to [0, 1]: the range's lower end and below becomes 0, its upper end and above 1."""
    low, high = (end[..., None, None, None] for end in value_range.to(values.device).unbind(-1))
    return ((values.float() - low) / (high - low).clamp_min(1e-12)).clamp_(0, 1)


def stretch_window(
    hu: Float[Tensor, " b *rest"], lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], intensity: CTIntensity
) -> Float[Tensor, " b *rest"]:
    """Clip each image to its own HU window and stretch that window over the contract's.

    With `lower, upper` equal to the contract's window this is the contract's own clipping, so random windows in
    training and the fixed window afterwards share one scale.

    Args:
        hu: Hounsfield units, float.
        lower: Lower end of each image's window [HU].
        upper: Upper end of each image's window [HU], above `lower`.
        intensity: Gives the range that the window is stretched over.

    Returns:
        Values in [hu_min, hu_max] of the contract, still to be normalised by `normalise`.
    """
    shape = (-1,) + (1,) * (hu.ndim - 1)
    low, high = lower.view(shape), upper.view(shape)
    unit = (hu.clamp(min=low, max=high) - low) / (high - low)
    return unit * (intensity.hu_max - intensity.hu_min) + intensity.hu_min


def to_picture(
    stored: Shaped[Tensor, "*batch h w"],
    modality: Modality,
    value_range: Float[Tensor, "*#batch 2"] | None = None,
    window: Window | tuple[float, float] = "soft_tissue",
) -> UInt8[Tensor, "*batch h w"]:
    """Return an 8-bit picture for people to look at.

    Args:
        stored: Grey values as stored.
        modality: CT is shown in a window, everything else by its range.
        value_range: Stored values shown as black and white; not for CT.
        window: Of CT: its name, or level and width [HU].
    """
    if modality == "ct":
        level, width = CT_WINDOWS_HU[window] if isinstance(window, str) else window
        unit = (stored.float() - (level - width / 2)) / width
    else:
        unit = stored.float() if value_range is None else to_unit(stored.unsqueeze(-3), value_range).squeeze(-3)
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def is_foreground(
    stored: Shaped[Tensor, "*batch h w"], modality: Modality, value_range: Float[Tensor, "*#batch 2"] | None = None
) -> Bool[Tensor, "*batch h w"]:
    """Return where there is more than air (CT) or darkness (MR, pictures)."""
    if modality == "ct":
        return stored > _AIR_HU
    unit = stored.float() if value_range is None else to_unit(stored.unsqueeze(-3), value_range).squeeze(-3)
    return unit > _DARK


def check_modality(model: Modality, data: Modality, where: str) -> str:
    """Return what to tell people where a model is given another modality than it was made for, or ""."""
    if model == data:
        return ""
    return f"{where}: the model's input contract is for {MEMBERS[model].values_are}, the data are {MEMBERS[data].values_are}"
