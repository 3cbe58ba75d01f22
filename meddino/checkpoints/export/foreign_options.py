"""What writing a model for another library needs to know."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meddino.core.errors import CheckpointError


@dataclass(frozen=True)
class ForeignOptions:
    """What writing a model for another library needs to know.

    Attributes:
        slices: To compare on, [2, h, w] each: Hounsfield units, or values in [0, 1] for a model of another modality.
        dtype: Of the weights in the file.
        onnx_layers: Blocks whose patch maps the ONNX model gives besides.
    """

    slices: Sequence[Tensor]
    dtype: torch.dtype = torch.float32
    onnx_layers: tuple[int, ...] = ()


def need(packages: Sequence[str], extra: str) -> None:
    """Refuse early where an optional library is absent.

    Raises:
        CheckpointError: Names the extra that brings it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise CheckpointError(f"this export needs {', '.join(missing)}; install with: pip install 'meddino[{extra}]'")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep a library's own reports off the screen: warnings, its loggers below errors, and what it prints on stdout."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
