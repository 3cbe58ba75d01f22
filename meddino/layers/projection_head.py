"""The head between tokens and prototypes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.device import at_least_float32
from meddino.layers.linear import Linear


class ProjectionHead(nn.Module):
    """A perceptron to a bottleneck of unit length, then one bias-free linear layer to the prototypes.

    Args:
        in_dim: Width of the tokens.
        prototypes: Number of prototypes.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width of the bottleneck.
        layers: Number of linear layers up to the bottleneck, >= 1.
        unit_prototypes: Prototypes start with length one, so that logits differ enough from the first step on for heads
            trained from scratch to leave the uniform assignment within some hundred steps (ours).

    Source: DINO (Caron et al. 2021) without the weight norm of the last layer, as in DINOv3.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        unit_prototypes: bool = False,
    ) -> None:
        super().__init__()
        self.unit_prototypes = unit_prototypes
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for index in range(layers):
            modules.append(Linear(widths[index], widths[index + 1]))
            if index < layers - 1:
                modules.append(nn.GELU())
        # A one-layer head is a bare linear in official files ("mlp.weight"), not "mlp.0.weight".
        self.mlp = nn.Sequential(*modules) if layers > 1 else modules[0]
        self.last_layer = Linear(bottleneck_dim, prototypes, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from a normal of standard deviation 0.02, cut at 2; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.unit_prototypes:
            with torch.no_grad():
                self.last_layer.weight.copy_(functional.normalize(self.last_layer.weight, dim=-1))

    def forward(
        self, x: Float[Tensor, "... dim"], no_last_layer: bool = False, only_last_layer: bool = False
    ) -> Float[Tensor, "... out"]:
        """Return logits over the prototypes.

        Args:
            x: Tokens; or bottleneck features if `only_last_layer`.
            no_last_layer: Stop at the bottleneck, of length one in each row, in float32 at least.
            only_last_layer: Go from the bottleneck to the prototypes.
        """
        if not only_last_layer:
            # What losses start from is float32 at least, on every device; and float16 would underflow with 1e-12.
            x = functional.normalize(at_least_float32(self.mlp(x)), dim=-1, eps=1e-12)
        if not no_last_layer:
            x = self.last_layer(x.to(self.last_layer.weight.dtype))
        return x
