"""MedDINO: domain-adaptive self-supervised pretraining of vision transformers on CT and other medical images.

In a notebook: `meddino.load` a model, `meddino.read_volume`, `model.encode_volume`, and look at the tokens with `meddino.pca`
and `meddino.similarity`. docs/api.md says more; the commands (`meddino-curate`, `meddino-pretrain`, ...) do the rest.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meddino.checkpoints.export.model import Model
    from meddino.models.patch_maps import pca, similarity
    from meddino.models.volume_tokens import VolumeTokens
    from meddino.volumes.volume import Volume

    __version__: str

__all__ = ["Model", "Volume", "VolumeTokens", "__version__", "load", "pca", "read_volume", "similarity"]

_LAZY = {
    "Model": "meddino.checkpoints.export.model",
    "Volume": "meddino.volumes.volume",
    "VolumeTokens": "meddino.models.volume_tokens",
    "pca": "meddino.models.patch_maps",
    "similarity": "meddino.models.patch_maps",
}
"""Where public names live; each is imported when it is first asked for, so that `import meddino` takes no time."""


def load(source: str | Path, *, seed: int = 0) -> "Model":
    """Load a model: an export, a run, a weights file, or `random:<backbone>`; see `meddino.checkpoints.export.model.load`."""
    from meddino.checkpoints.export.model import load as load_model

    return load_model(source, seed=seed)


def read_volume(path: str | Path) -> "Volume":
    """Read a CT or MR volume from a file or a folder of DICOM files; see `meddino.volumes.read.read_volume`.

    Returns:
        Voxels with spacing, affine and what was decided (`notes`).
    """
    from meddino.volumes.read import read_volume as read

    return read(Path(path))


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        globals()[name] = getattr(import_module(_LAZY[name]), name)
        return globals()[name]
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("meddino")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module 'meddino' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
