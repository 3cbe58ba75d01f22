"""`meddino-pretrain bench`: how fast steps and loader are. A method's own sizes are options of it."""

import argparse
from importlib import import_module

from meddino_pretrain.methods import METHODS
from meddino_pretrain.methods.config import MethodConfig

DEFAULT_METHOD = "dinov3"


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command say what a slice gives; `method_config` reads it."""
    import_module(METHODS[DEFAULT_METHOD].bench).add_arguments(parser)


def checked_config(size: str) -> MethodConfig:
    """Return the method at a size of `check-gpu`: tiny or paper."""
    sizes = import_module(METHODS[DEFAULT_METHOD].bench).CHECKED_SIZES[size]
    return method_config(argparse.Namespace(**sizes))


def method_config(arguments: argparse.Namespace) -> MethodConfig:
    """Return the method with the sizes asked for."""
    config: MethodConfig = import_module(METHODS[DEFAULT_METHOD].bench).config_from(arguments)
    return config
