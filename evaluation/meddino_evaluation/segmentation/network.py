"""The network that segments: an encoder whose blocks are tapped, and a head."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import ConfigError
from meddino.data.contract import InputContract


@dataclass(frozen=True)
class EncoderSource:
    """A model as it comes from `load_encoder`.

    Attributes:
        name: As the user wrote it.
        backbone: With `get_intermediate_layers(images, blocks)` -> list of [B, D, rows, cols].
        contract: How intensities become its input.
        model_hash: Of weights and architecture.
        lineage: What the export says of its training data, or empty.
    """

    name: str
    backbone: Any
    contract: InputContract
    model_hash: str
    lineage: dict[str, Any]


class SegmentationNetwork(nn.Module):
    """Encoder and head.

    Args:
        backbone: Vision transformer.
        blocks: Blocks whose patch tokens the head reads.
        head: Built by `build_head`.
        contract: How intensities become model input.
        trains_encoder: Whether anything in the encoder learns; if not, it runs without gradients and in evaluation mode.
    """

    backbone: Any  # a module whose further methods nn.Module's type does not know

    def __init__(
        self, backbone: nn.Module, blocks: tuple[int, ...], head: nn.Module, contract: InputContract, trains_encoder: bool
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.blocks, self.contract, self.trains_encoder = blocks, contract, trains_encoder
        backbone.requires_grad_(trains_encoder)

    def train(self, mode: bool = True) -> "SegmentationNetwork":
        """Switch to training; a frozen encoder stays in evaluation mode, or its buffers would drift."""
        super().train(mode)
        self.backbone.train(mode and self.trains_encoder)
        return self

    def tokens(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch taps dim rows cols"]:
        """Return the normalised patch tokens of the tapped blocks; CLS and registers are dropped.

        Args:
            images: Model input, from `model_input`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            return torch.stack(self.backbone.get_intermediate_layers(images, self.blocks), dim=1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Return logits of model input."""
        logits: Tensor = self.head(self.tokens(images), images)
        return logits


def model_input(
    intensities: Float[Tensor, "batch channels height width"], contract: InputContract
) -> Float[Tensor, "batch inputs height width"]:
    """Clip and normalise by the contract.

    Args:
        intensities: One channel, which is repeated as often as the model wants, or exactly as many as it wants.
        contract: The model's.

    Raises:
        ConfigError: Neither fits.
    """
    channels = intensities.shape[1]
    if channels == 1:
        return contract.apply(intensities[:, 0])
    if channels != contract.channels:
        raise ConfigError(
            f"{channels} image channels come in (data.channels, data.neighbour_slices), but the model takes "
            f"{contract.channels}; one channel is repeated, otherwise the numbers must be equal"
        )
    return contract.model_copy(update={"channels": 1}).apply(intensities).squeeze(2)


def pad_value(contract: InputContract) -> float:
    """Return what lies outside a slice: the lower end of the window (air), normalised."""
    return (contract.hu_min - contract.mean) / contract.std


def state_hash(modules: nn.Module) -> str:
    """SHA-256 of every parameter and every buffer of a module, with names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(modules):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0])
