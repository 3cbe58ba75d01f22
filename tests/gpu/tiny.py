"""A step small enough for seconds: all terms of DINOv3, every kind of frozen network, drop path."""

from typing import Any

from meddino_pretrain.bench.check_gpu import fill_layerscale
from meddino_pretrain.bench.step import MeasuredStep, StepSize
from meddino_pretrain.methods.dinov3.config import (
    CropsConfig,
    CropSizes,
    DINOv3Config,
    GramTeacherConfig,
    HeadConfig,
    HeadsConfig,
    LossesConfig,
    TeacherConfig,
)
from torch import Tensor

from meddino.core.device import find_machine
from meddino.core.machine_config import MachineConfig
from meddino.distributed.parallel import whole


def tiny_method(global_px: int = 32, local_px: int = 16) -> DINOv3Config:
    """Return a method with Gram anchoring and distillation to the initial weights."""
    head = HeadConfig(prototypes=64, hidden_dim=32, bottleneck_dim=16)
    return DINOv3Config(
        losses=LossesConfig(gram_weight=2.0, distill_to_init_weight=0.1),
        heads=HeadsConfig(dino=head, ibot=head),
        crops=CropsConfig(sizes=(CropSizes(global_px=global_px, local_px=local_px, gram_px=2 * global_px),), num_local=3),
        teacher=TeacherConfig(ema_momentum=0.9, ema_momentum_end=0.9, temperature_warmup_steps=0),
        freeze_last_layer_steps=0,
        gram_teacher=GramTeacherConfig(stage="earlier", step=1),
    )


def tiny_size(accumulation: int = 1, **sizes: int) -> StepSize:
    """Return eight images through a nano ViT."""
    return StepSize("vitnano8", 8, tiny_method(**sizes), {"drop_path": 0.3}, accumulation)


def tiny_step(precision: Any, accumulation: int = 1, **config: Any) -> MeasuredStep:
    """Return a step of this process's share on the CPU, with a LayerScale of 1: the image has to reach the losses."""
    step = MeasuredStep(tiny_size(accumulation), find_machine("cpu", precision), MachineConfig(**config))
    fill_layerscale(step)
    return step


def gradients(step: MeasuredStep) -> dict[str, Tensor]:
    """Return every parameter's last gradient, gathered, after clipping."""
    return {name: whole(each.grad) for name, each in step.method.model.named_parameters() if each.grad is not None}
