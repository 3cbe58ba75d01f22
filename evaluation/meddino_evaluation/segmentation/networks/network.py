"""The network that segments: a backbone whose blocks are tapped, and a head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import ConfigError
from meddino.data.model_input import normalise, normalise_channels
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.adaptation.fitting import learned_state
from meddino_evaluation.adaptation.trainable import set_training_mode
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.segmentation.config import EncoderMode


@dataclass(frozen=True)
class EncoderSource:
    """A model as it comes from `load_encoder`.

    Attributes:
        name: As the user wrote it.
        backbone: Gives maps of patch tokens.
        contract: How intensities become its input.
        model_hash: Of weights and architecture.
        lineage: What the export says of its training data, or empty.
    """

    name: str
    backbone: Backbone
    contract: ImageContract
    model_hash: str
    lineage: dict[str, Any] = field(default_factory=dict)


class SegmentationNetwork(nn.Module):
    """Encoder and head.

    Args:
        backbone: Any backbone; which of its parameters learn has been decided.
        taps: Blocks whose patch tokens the head reads.
        head: Takes the tapped maps and the images.
        contract: How intensities become model input.
        mode: What of the encoder learns.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, taps: int, head: nn.Module, contract: ImageContract, mode: EncoderMode) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.taps, self.contract, self.mode = taps, contract, mode

    @property
    def trains_encoder(self) -> bool:
        """Whether anything in the encoder learns."""
        return self.mode != "frozen"

    def train(self, mode: bool = True) -> "SegmentationNetwork":
        """Switch to training. What is held stays in evaluation mode, or its buffers would drift."""
        super().train(mode)
        self.backbone.eval()
        if mode and self.trains_encoder:
            set_training_mode(self.backbone)
            if self.mode == "finetune" and isinstance(self.backbone.network, VisionTransformer):
                self.backbone.network.train()  # drop path and coordinate augmentation
        return self

    def maps(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Return the maps of the tapped blocks; CLS and registers are dropped.

        Args:
            images: Model input, from `model_input`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            return self.backbone.patch_maps(images, self.taps)

    def learned_state(self) -> dict[str, Tensor]:
        """Return what training may change: the head, what learns in the encoder, and an encoder's running statistics."""
        return learned_state(self, "" if self.trains_encoder else "head.")

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Return logits of model input."""
        logits: Tensor = self.head(self.maps(images), images)
        return logits


def model_input(
    intensities: Float[Tensor, "batch channels height width"], contract: ImageContract
) -> Float[Tensor, "batch inputs height width"]:
    """Clip and normalise by the contract.

    Args:
        intensities: One channel, which is repeated as often as the model wants, or exactly as many as it wants.
        contract: The model's.

    Raises:
        ConfigError: Neither fits.
    """
    channels = intensities.shape[1]
    if channels not in (1, contract.channels):
        raise ConfigError(
            f"{channels} image channels come in (data.channels, data.neighbour_slices), but the model takes "
            f"{contract.channels}; one channel is repeated, otherwise the numbers must be equal"
        )
    if contract.own is None or contract.own.modality != contract.given:
        low, high = contract.shown_range
        return contract.from_unit((intensities.clamp(low, high) - low) / (high - low))
    if channels == 1:
        return normalise(intensities[:, 0], contract.own)
    return normalise_channels(intensities.clamp(*contract.shown_range), contract.own)


def map_shapes(backbone: Backbone, taps: int, channels: int, side_px: int) -> list[tuple[int, int]]:
    """Return (channels, stride) of each tapped map, by asking the backbone with an empty image."""
    with torch.no_grad():
        device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
        maps: Sequence[Tensor] = backbone.patch_maps(torch.zeros(1, channels, side_px, side_px, device=device), taps)
    return [(int(one.shape[1]), round(side_px / one.shape[-1])) for one in maps]
