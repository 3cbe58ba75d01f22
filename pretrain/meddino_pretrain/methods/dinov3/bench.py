"""Sizes of DINOv3's views and heads as options of `meddino-pretrain bench`."""

import argparse

from meddino.core.errors import ConfigError
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

CHECKED_SIZES: dict[str, dict[str, int | bool]] = {
    "tiny": {"global_size": 32, "local_size": 16, "locals": 2, "prototypes": 64, "gram": True},
    "paper": {"global_size": 256, "local_size": 112, "locals": 8, "prototypes": 65536, "gram": False},
}
"""What `meddino-pretrain check-gpu` measures with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command say what a step holds; `config_from` reads it."""
    parser.add_argument("--global-size", type=int, default=224, help="side of the two global crops [px]")
    parser.add_argument("--local-size", type=int, default=96, help="side of the local crops [px]")
    parser.add_argument("--locals", type=int, default=8, help="local crops of each image")
    parser.add_argument("--prototypes", type=int, default=65536, help="prototypes of each head")
    parser.add_argument("--gram", action="store_true", help="with Gram anchoring, the Gram teacher at twice the size")


def config_from(arguments: argparse.Namespace) -> DINOv3Config:
    """Return the config with the sizes asked for, all else as DINOv3 has it.

    Raises:
        ConfigError: A size is out of range.
    """
    size, gram = arguments.global_size, arguments.gram
    if min(size, arguments.local_size) < 1 or arguments.prototypes < 2 or arguments.locals < 0:
        raise ConfigError("bench needs --global-size and --local-size of 1 or more, --prototypes >= 2, --locals >= 0")
    sizes = CropSizes(global_px=size, local_px=arguments.local_size, gram_px=2 * size if gram else None)
    head = HeadConfig(prototypes=arguments.prototypes)
    return DINOv3Config(
        losses=LossesConfig(gram_weight=2.0 if gram else 0.0),
        heads=HeadsConfig(dino=head, ibot=head),
        crops=CropsConfig(sizes=(sizes,), num_local=arguments.locals),
        teacher=TeacherConfig(ema_momentum=0.994, ema_momentum_end=0.994, temperature_warmup_steps=0),
        freeze_last_layer_steps=0,
        gram_teacher=GramTeacherConfig(stage="earlier", step=1) if gram else None,
    )
