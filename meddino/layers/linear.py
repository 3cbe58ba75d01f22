"""Linear layers and products. The one door to the float32 products of a CPU in `meddino.layers.cpu`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.layers.cpu import matmul


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Project the last dimension."""
        return linear(input, self.weight, self.bias)


class KeyMaskedLinear(Linear):
    """A linear layer to queries, keys and values in which the keys' bias is multiplied by zero.

    A bias on the keys adds the same number to every score of a query, so softmax removes it again; left free it only
    drifts. The mask is the buffer `bias_mask` ([3 * dim], 1 for queries and values, 0 for keys), as in official files.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.register_buffer("bias_mask", torch.empty(out_features))
        self.reset_mask()

    def reset_mask(self) -> None:
        """Fill the mask: the middle third, which is the keys', is zero."""
        third = self.out_features // 3
        with torch.no_grad():
            self.bias_mask.fill_(1.0)
            self.bias_mask[third : 2 * third] = 0.0

    def masked_bias(self) -> Float[Tensor, " out"]:
        """Return the bias that is added."""
        return self.bias * self.bias_mask.to(self.bias.dtype)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Project; the last dimension becomes queries, keys, values, each `out / 3` wide."""
        return linear(input, self.weight, self.masked_bias())


def linear(
    x: Float[Tensor, "... in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "... out"]:
    """Return x weight^T + bias."""
    return matmul.linear(x, weight, bias) if matmul.takes(x, weight) else functional.linear(x, weight, bias)


product = matmul.product
"""left right^T + bias without a gradient; what losses and gradients of our own multiply with, on any device."""
