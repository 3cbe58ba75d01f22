"""The two-layer perceptron of a block, plain or gated."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.errors import ConfigError
from meddino.layers.linear import Linear

# Hidden widths of the gated kind are rounded up to a multiple of this.
SWIGLU_MULTIPLES = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Transform every token by itself."""
        hidden: Tensor = functional.gelu(self.fc1(x))
        output: Tensor = self.fc2(hidden)
        return output


class SwiGLU(nn.Module):
    """silu(w1 x) * (w2 x), then w3 (Shazeer 2020).

    Args:
        dim: Width of the tokens.
        hidden_dim: Width that a plain perceptron would have; the gated one takes two thirds of it, so that the number
            of parameters stays the same, rounded up to `multiple`.
        multiple: See `SWIGLU_MULTIPLES`.
    """

    def __init__(self, dim: int, hidden_dim: int, multiple: int = 8) -> None:
        super().__init__()
        width = int(hidden_dim * 2 / 3)
        width += -width % multiple
        self.w1 = Linear(dim, width)
        self.w2 = Linear(dim, width)
        self.w3 = Linear(width, dim)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Transform every token by itself."""
        output: Tensor = self.w3(functional.silu(self.w1(x)) * self.w2(x))
        return output


def build_feed_forward(kind: str, dim: int, ratio: float) -> nn.Module:
    """Return the perceptron a config names.

    Args:
        kind: "mlp" or one of `SWIGLU_MULTIPLES`.
        dim: Width of the tokens.
        ratio: Hidden width over `dim`, before SwiGLU's two thirds.

    Raises:
        ConfigError: If the kind is unknown.
    """
    hidden_dim = int(dim * ratio)
    if kind == "mlp":
        return Mlp(dim, hidden_dim)
    if kind in SWIGLU_MULTIPLES:
        return SwiGLU(dim, hidden_dim, SWIGLU_MULTIPLES[kind])
    raise ConfigError(f"ffn_layer is '{kind}'; allowed: mlp, {', '.join(SWIGLU_MULTIPLES)}")
