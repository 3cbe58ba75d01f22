"""The network that nnU-Net trains: a backbone with multi-scale token aggregation and the Primus decoder."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.models.registry import tapped_blocks
from meddino.models.vision_transformer import VisionTransformer, ViTConfig
from meddino_evaluation.segmentation.networks.heads import PrimusHead, he_initialise


class MedDINONetwork(nn.Module):
    """Logits of 2D slices that nnU-Net has normalised by the model's input contract.

    Args:
        config: The backbone.
        num_outputs: Logit maps.
    """

    def __init__(self, config: ViTConfig, num_outputs: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(config)
        self.taps = tapped_blocks(config.depth, min(4, config.depth))
        self.head = PrimusHead([(config.embed_dim, config.patch_size)] * len(self.taps), num_outputs)
        he_initialise(self.head)

    def forward(self, slices: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Return logits.

        Args:
            slices: Normalised; sides are multiples of the backbone's patch size.
        """
        images = slices.repeat(1, self.backbone.config.in_chans, 1, 1)
        logits: Tensor = self.head(self.backbone.get_intermediate_layers(images, self.taps), images)
        return logits

    def parameter_groups(self, head_lr: float, backbone_lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: the decoder first, whose rate nnU-Net logs."""
        return [
            {"params": list(self.head.parameters()), "lr": head_lr},
            {"params": list(self.backbone.parameters()), "lr": backbone_lr},
        ]


def network_from_plans(plans: Mapping[str, Any], num_input_channels: int, num_outputs: int, drop_path: float) -> MedDINONetwork:
    """Build the network that plans of `meddino-eval nnunet-plans` describe, with fresh weights.

    Args:
        plans: nnU-Net's, with our section "meddino".
        num_input_channels: Of nnU-Net's data set.
        num_outputs: Logit maps.
        drop_path: Share of samples that each residual branch leaves out in training.

    Raises:
        ConfigError: The plans are not ours, or the images have several channels.
    """
    if "meddino" not in plans:
        raise ConfigError(
            "these plans do not name a MedDINO model; make some with: meddino-eval nnunet-plans DATASET --model MODEL, "
            "then train with -p MedDINOPlans"
        )
    if num_input_channels != 1:
        raise ConfigError(f"the data set has {num_input_channels} image channels; MedDINO models take one, CT")
    config = check_config(ViTConfig, plans["meddino"]["architecture"], where="plans: meddino.architecture")
    with torch.no_grad():
        return MedDINONetwork(config.model_copy(update={"drop_path": drop_path}), num_outputs)


class LinearDecay:
    """Each group's rate, from its first value linearly to zero; nnU-Net calls `step(epoch)`."""

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        """Remember the first rates.

        Args:
            optimizer: Its groups' rates are set.
            epochs: Length of the training.
        """
        self.optimizer, self.epochs = optimizer, epochs
        self.first = [group["lr"] for group in optimizer.param_groups]

    def step(self, epoch: int) -> None:
        """Set the rates of an epoch, from 0."""
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = first * (1 - epoch / self.epochs)
