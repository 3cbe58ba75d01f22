"""MODEL of the command line: whatever `load_backbone` knows, or `none` for networks of their own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.logging import get_logger
from meddino.data.intensity import BrightnessIntensity, CTIntensity
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.backbones.adapter import Backbone, Tokens, state_hash
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.segmentation.networks.network import EncoderSource

NONE = "none"
logger = get_logger(__name__)


class NoBackbone(Backbone):
    """Stands where a network of its own (U-Net, SegFormer, ...) reads nothing but the image."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.name, self.spec, self.lineage, self.embed_dim, self.patch_size = NONE, "", {}, 0, 1
        self.contract = ImageContract((), (), 1, 1, CTIntensity(channels=1))

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """There are none."""
        raise ConfigError("model none has no tokens")

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """Return no map."""
        return []

    def stages(self) -> Sequence[nn.Module]:
        """Return no stage."""
        return []

    def hash(self) -> str:
        """Return that of no tensors."""
        return state_hash(self)


def load_encoder(model: str, random_seed: int = 0) -> EncoderSource:
    """Load what MODEL means.

    Args:
        model: What `load_backbone` knows (an export, a run, a checkpoint, a weights file, `random:<backbone>`,
            `random:<export folder>` for its architecture and input contract with fresh weights, ...), or `none`.
        random_seed: Seed of fresh weights.

    Raises:
        ConfigError: Nothing of that name exists.
        CheckpointError: It exists and is damaged or of another kind.
    """
    backbone = NoBackbone() if model == NONE else load_backbone(model, random_seed)
    vit = None if model == NONE else backbone.network
    if isinstance(vit, VisionTransformer) and vit.config.in_chans != backbone.contract.channels:
        raise CheckpointError(
            f"model {model}: its patch embedding takes {vit.config.in_chans} channels, its input contract says "
            f"{backbone.contract.channels}"
        )
    return EncoderSource(backbone.spec or model, backbone, backbone.contract, backbone.hash(), dict(backbone.lineage))


def widened(source: EncoderSource, channels: int) -> EncoderSource:
    """Return a model that takes another number of channels: its first layer's weights are repeated over them.

    Equal channels give what one repeated channel gave. Nothing is drawn at random, so a frozen encoder stays one.

    Source: timm's rule for in_chans. Difference: the scale is that of each of the model's channels, not of all together.

    Args:
        source: A model; its backbone is changed.
        channels: What comes in.

    Raises:
        ConfigError: The model has no first convolution that takes its channels.
    """
    own = source.contract.channels
    if channels == own:
        return source
    if source.name != NONE:
        _repeat_first_layer(source, own, channels)
        network: Any = source.backbone.network
        if hasattr(network, "config"):
            network.config = network.config.model_copy(update={"in_chans": channels})
        logger.warning(
            "model %s takes %d channels and is given %d: its first layer's weights are repeated over them and scaled",
            *(source.name, own, channels),
        )
    means, stds = (
        (source.contract.own.channel_mean, source.contract.own.channel_std)
        if source.contract.own is not None
        else (source.contract.mean, source.contract.std)
    )
    if source.contract.own is not None and not isinstance(source.contract.own, BrightnessIntensity):
        contract = replace(source.contract, own=source.contract.own.model_copy(update={"channels": channels}))
    else:
        mean, std = (tuple(ends[place % own] for place in range(channels)) for ends in (means, stds))
        contract = replace(source.contract, own=None, mean=mean, std=std)
    return replace(source, contract=contract)


def _repeat_first_layer(source: EncoderSource, own: int, channels: int) -> None:
    for parent in source.backbone.network.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and layer.in_channels == own and layer.groups == 1:
                wide = nn.Conv2d(
                    channels,
                    layer.out_channels,
                    (layer.kernel_size[0], layer.kernel_size[1]),
                    (layer.stride[0], layer.stride[1]),
                    layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
                    bias=layer.bias is not None,
                    device=layer.weight.device,
                )
                with torch.no_grad():
                    wide.weight.copy_(_spread(layer.weight, channels))
                    if wide.bias is not None and layer.bias is not None:
                        wide.bias.copy_(layer.bias)
                setattr(parent, name, wide.requires_grad_(layer.weight.requires_grad).train(layer.training))
                return
    raise ConfigError(
        f"model {source.name} takes {own} channels, {channels} come in (data.channels, data.neighbour_slices), and it has no "
        "first convolution whose weights could be repeated"
    )


def _spread(weight: Tensor, channels: int) -> Tensor:
    """Return a convolution's weights for another number of inputs; their sum over inputs stays."""
    own = weight.shape[1]
    places = torch.arange(max(channels, own), device=weight.device)
    counts = torch.bincount(places % own, minlength=own)
    parts = weight[:, places % own] / counts[places % own].view(1, -1, 1, 1)
    return weight.new_zeros(weight.shape[0], channels, *weight.shape[2:]).index_add(1, places % channels, parts)
