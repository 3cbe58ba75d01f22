"""MedDINO: domain-adaptive self-supervised pretraining of vision transformers on CT."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meddino.checkpoints.export.model import Model
    from meddino.volumes.volume import Volume

__all__ = ["__version__", "load", "read_volume"]

try:
    __version__ = version("meddino")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def load(source: str | Path, *, seed: int = 0) -> "Model":
    """Load a model folder made by meddino-export; see `meddino.checkpoints.export.model.load`."""
    from meddino.checkpoints.export.model import load as load_model

    return load_model(source, seed=seed)


def read_volume(path: str | Path) -> "Volume":
    """Read a CT or MR volume from a file or a folder of DICOM files; see `meddino.volumes.read.read_volume`."""
    from meddino.volumes.read import read_volume as read

    return read(Path(path))
