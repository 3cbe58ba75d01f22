"""Which arithmetic losses are computed in."""

import torch
from torch import Tensor


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Return what a loss of this tensor is computed in: float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is float64 already: what a loss computes in."""
    return tensor.to(loss_dtype(tensor))
