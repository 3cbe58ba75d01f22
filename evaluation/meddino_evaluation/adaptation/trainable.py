"""Which parameters of a backbone learn: all, the last stages, biases, or low-rank additions. The rest is held, buffers too."""

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from meddino.core.errors import ConfigError
from meddino_evaluation.adaptation.config import FinetuneConfig
from meddino_evaluation.backbones.adapter import Backbone

Adaptation = Literal["finetune", "partial", "lora", "bitfit"]

LORA_TARGETS = re.compile(
    r"(^|\.)(qkv|mlp\.(fc1|fc2|w1|w2|w3|fc1_g|fc1_x)"  # ours, timm
    r"|attention\.(query|key|value)|(q|k|v)_proj|intermediate\.dense|(?<!attention\.)output\.dense|mlp\.(up_proj|down_proj))$"
)
"""S0 adapts qkv, fc1 and fc2; under the names of our models, timm's and transformers'."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def adapt(backbone: Backbone, mode: Adaptation, config: FinetuneConfig, seed: int) -> None:
    """Say which parameters of a backbone learn; LoRA adds its own.

    Args:
        backbone: A copy that may be changed.
        mode: "finetune": all. "partial": the last stages and whatever stands after them. "bitfit": biases.
            "lora": low-rank additions to qkv, fc1 and fc2.
        config: Ranks and numbers of stages.
        seed: Of LoRA's first matrices.

    Raises:
        ConfigError: The backbone has nothing of the kind.
    """
    backbone.requires_grad_(mode == "finetune")
    if mode == "bitfit":
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[-1].endswith("bias"))
    elif mode == "partial":
        _free_last_stages(backbone, config.partial_stages)
    elif mode == "lora":
        _add_lora(backbone, config, seed)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ConfigError(f"model {backbone.name} has nothing that protocol {mode} could train")


def set_training_mode(backbone: Backbone) -> None:
    """Put into training mode only what may change: LoRA's dropout, and batch norms whose scale and shift both learn.

    A batch norm that is held keeps its statistics (in published code they drifted); so does one of which BitFit trains the
    bias. Augmentations inside a backbone (drop path, RoPE jitter) stay off.
    """
    backbone.eval()
    for name, module in backbone.named_modules():
        own = list(module.parameters(recurse=False))
        learning_norm = isinstance(module, _BATCH_NORMS) and own and all(parameter.requires_grad for parameter in own)
        if learning_norm or (isinstance(module, nn.Dropout) and "lora_dropout" in name):
            module.train()


def held_tensors(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """Yield what must be identical afterwards: parameters that do not learn and buffers, but for batch norms in training."""
    moving = {
        f"{name}.{buffer}" if name else buffer
        for name, module in backbone.named_modules()
        if isinstance(module, _BATCH_NORMS) and all(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for buffer, _ in module.named_buffers(recurse=False)
    }
    yield from ((name, parameter) for name, parameter in backbone.named_parameters() if not parameter.requires_grad)
    yield from ((name, buffer) for name, buffer in backbone.named_buffers() if name not in moving)


def _free_last_stages(backbone: Backbone, count: int) -> None:
    stages = list(backbone.stages())
    if count > len(stages):
        raise ConfigError(f"model {backbone.name} has {len(stages)} stages; finetune.partial_stages is {count}")
    inside = {id(parameter) for stage in stages for parameter in stage.parameters()}
    after = False
    for parameter in backbone.parameters():
        # What is registered after the first block and belongs to none stands behind them: last norms, necks.
        after = after or id(parameter) in inside
        parameter.requires_grad_(after and id(parameter) not in inside)
    for stage in stages[-count:]:
        stage.requires_grad_(True)


def _add_lora(backbone: Backbone, config: FinetuneConfig, seed: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("protocol lora needs peft, which is not installed: pip install 'meddino[lora]'") from error
    targets = lora_targets(backbone)
    if not targets:
        raise ConfigError(
            f"protocol lora: model {backbone.name} has no linear layers qkv, fc1 or fc2 (a convolutional network?)"
        )
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_targets(backbone: Backbone) -> list[str]:
    """Return the names of the linear layers that LoRA adapts."""
    return [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and LORA_TARGETS.search(name)]
