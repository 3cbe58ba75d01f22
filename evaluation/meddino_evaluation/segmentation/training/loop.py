"""Training a segmentation head, and the encoder where asked: one loop, a pure function of its seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino_evaluation.data.labels import IGNORED, LabelScheme
from meddino_evaluation.segmentation.config import TrainingConfig
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork, model_input
from meddino_evaluation.segmentation.training.losses import class_loss, region_loss
from meddino_evaluation.segmentation.training.map_cache import CropKey, MapCache
from meddino_evaluation.segmentation.training.samples import Crop, CropBatch, CropSampler

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One line of train.jsonl."""

    step: int
    loss: float
    lr: float
    grad_norm: float


class Trainer:
    """Runs the steps.

    Args:
        network: Encoder and head, on the machine.
        sampler: Batches by step.
        labels: Meaning of the label values.
        config: Steps, learning rates, losses.
        machine: Device and arithmetic.
        cache: Maps by crop where the encoder is frozen and crops lie on a grid; None computes them each time.
        seed: Of what is random in a learning encoder (drop path, coordinate augmentation).
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        sampler: CropSampler,
        labels: LabelScheme,
        config: TrainingConfig,
        machine: Machine,
        cache: MapCache | None = None,
        seed: int = 0,
    ) -> None:
        self.network, self.sampler, self.labels = network, sampler, labels
        self.config, self.machine, self.cache, self.seed = config, machine, cache, seed
        self.optimizer = build_optimizer(network, config)

    def fit(self, on_step: Callable[[StepRecord], bool], start: int = 0) -> None:
        """Train for `config.steps` steps.

        Args:
            on_step: Called after each step; False ends the training.
            start: Steps that an earlier, killed training has done.

        Raises:
            MedDINOError: The loss is no number.
        """
        self.network.train()
        for step in range(start, self.config.steps):
            batch = self.sampler.batch(step)
            torch.manual_seed(derive_seed(self.seed, "step", step))
            factor = 1 - step / self.config.steps  # linear decay to zero, no warm-up
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(self.learning(), self.config.clip_norm)
            value = float(loss.detach())
            if not math.isfinite(value) or not math.isfinite(float(norm)):
                raise MedDINOError(
                    f"step {step}: the loss is {value}, the gradients' norm {float(norm)}; nothing of this step was kept; "
                    "try a smaller training.lr_head or training.lr_encoder, or precision=fp32"
                )
            self.optimizer.step()
            if not on_step(StepRecord(step, value, self.optimizer.param_groups[0]["lr"], float(norm))):
                break

    def _loss(self, batch: CropBatch) -> Tensor:
        device = self.machine.device
        inputs = model_input(batch.intensities, self.network.contract).to(device)
        with self.machine.autocast():
            if self.cache is None:
                logits = self.network(inputs)
            else:
                keys = tuple(self._key(crop) for crop in batch.crops)
                logits = self.network.head(self.cache.maps(inputs, keys), inputs)
        return segmentation_loss(logits, batch.labels, self.labels, self.config)

    def _key(self, crop: Crop) -> CropKey:
        return CropKey(self.sampler.cases[crop.case].name, crop.z, crop.y, crop.x)

    def learning(self) -> list[nn.Parameter]:
        """Return what learns, in a fixed order."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def segmentation_loss(logits: Tensor, values: NDArray[np.int32], labels: LabelScheme, config: TrainingConfig) -> Tensor:
    """Return Dice + cross-entropy of logits [B, K, H, W] against label values [B, H, W]."""
    device = logits.device
    if not labels.has_regions:
        targets = torch.from_numpy(labels.class_indices(values)).to(device)
        return class_loss(logits, targets, config.dice_weight, config.ce_weight)
    masks = np.stack([labels.mask(values, target) for target in range(len(labels.names))], axis=1)
    counted = torch.from_numpy(values != IGNORED).unsqueeze(1).to(device, torch.float32)
    regions = torch.from_numpy(masks).to(device, torch.float32)
    return region_loss(logits, regions, counted, config.dice_weight, config.ce_weight)


def build_optimizer(network: SegmentationNetwork, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what learns; head and encoder have learning rates of their own."""
    groups = []
    lr_encoder = config.lr_adapter if network.mode in ("lora", "bitfit") else config.lr_encoder
    for module, lr in ((network.head, config.lr_head), (network.backbone, lr_encoder)):
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if learning:
            groups.append({"params": learning, "lr": lr, "peak_lr": lr})
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
