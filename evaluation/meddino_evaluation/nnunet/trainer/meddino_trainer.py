"""`nnUNetv2_train DATASET 2d FOLD -tr MedDINOTrainer -p MedDINOPlans`: fine-tunes an export inside nnU-Net (>= 2.8).

nnU-Net finds this class through its environment variable nnUNet_extTrainer; `meddino-eval nnunet-plans` prints the line.
"""

import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from meddino.checkpoints.weights.load import load_backbone_weights
from meddino_evaluation.nnunet.network import LinearDecay, MedDINONetwork, network_from_plans

COMPILE_VARIABLE = "nnUNet_compile"


class MedDINOTrainer(nnUNetTrainer):  # type: ignore[misc]
    """MedDINOv3's fine-tuning: AdamW (0.9, 0.98), decoder 3e-4, backbone 3e-5, linear decay, drop path 0.2.

    nnU-Net's own augmentation, Dice and cross-entropy, foreground oversampling 0.33, clipping at 12 and 1,000 x 250
    steps stay; deep supervision is off, as the decoder has one output.
    """

    head_lr = 3e-4
    backbone_lr = 3e-5
    drop_path = 0.2

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.head_lr
        self.weight_decay = 5e-2
        self.enable_deep_supervision = False

    def initialize(self) -> None:
        """Build everything, then fill the backbone with the export's weights."""
        super().initialize()
        model = os.environ.get("MEDDINO_MODEL") or self.plans_manager.plans["meddino"]["model"]
        network = self._plain_network()
        weights = load_backbone_weights(Path(model), network.backbone.config)
        weights.load_into(network.backbone)
        self.print_to_log_file(weights.coverage.text())

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network; nnU-Net calls this for prediction too, where its own checkpoint has the weights."""
        return network_from_plans(plans_manager.plans, num_input_channels, num_output_channels, MedDINOTrainer.drop_path)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LinearDecay]:
        """Return AdamW with two rates and their linear decay to zero."""
        groups = self._plain_network().parameter_groups(self.head_lr, self.backbone_lr)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        return optimizer, LinearDecay(optimizer, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the decoder has one output."""

    def _do_i_compile(self) -> bool:
        # The packed forward and its rotary tables change with the image size; compiling costs more than it gives here.
        return COMPILE_VARIABLE in os.environ and bool(super()._do_i_compile())

    def _plain_network(self) -> MedDINONetwork:
        network = getattr(self.network, "module", self.network)
        plain = getattr(network, "_orig_mod", network)
        assert isinstance(plain, MedDINONetwork)
        return plain
