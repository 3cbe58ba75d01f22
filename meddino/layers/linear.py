"""The query/key/value projection whose key bias is held at zero."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class KeyMaskedLinear(nn.Linear):
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

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Project; the last dimension becomes queries, keys, values, each `out / 3` wide."""
        return functional.linear(input, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))
