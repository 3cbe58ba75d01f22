"""Which arithmetic losses are computed in."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is float64 already: what a loss computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
