"""From Hounsfield units to what a model takes, by its input contract; and to pictures for people."""

import torch
from jaxtyping import Float
from torch import Tensor

from meddino.data.contract import InputContract


def normalise(hu: Float[Tensor, "*batch h w"], contract: InputContract) -> Float[Tensor, "*batch c h w"]:
    """Turn Hounsfield units into model input: clip, normalise, repeat over a new channel axis."""
    normalised = (hu.float().clamp(contract.hu_min, contract.hu_max) - contract.mean) / contract.std
    return normalised.unsqueeze(-3).repeat_interleave(contract.channels, dim=-3)


def stretch_window(
    hu: Float[Tensor, "b *rest"], lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], contract: InputContract
) -> Float[Tensor, "b *rest"]:
    """Clip each image to its own HU window and stretch that window over the contract's.

    With `lower, upper` equal to the contract's window this is the contract's own clipping, so random windows in
    training and the fixed window afterwards share one scale.

    Args:
        hu: Hounsfield units, float.
        lower: Lower end of each image's window [HU].
        upper: Upper end of each image's window [HU], above `lower`.
        contract: Gives the range that the window is stretched over.

    Returns:
        Values in [hu_min, hu_max] of the contract, still to be normalised by `normalise`.
    """
    shape = (-1,) + (1,) * (hu.ndim - 1)
    low, high = lower.view(shape), upper.view(shape)
    unit = (hu.clamp(min=low, max=high) - low) / (high - low)
    return unit * (contract.hu_max - contract.hu_min) + contract.hu_min


def to_uint8_window(hu: torch.Tensor, level: float = 40.0, width: float = 400.0) -> torch.Tensor:
    """Return an 8-bit picture of HU for people to look at (default: the usual soft-tissue window)."""
    unit = (hu.float() - (level - width / 2)) / width
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)
