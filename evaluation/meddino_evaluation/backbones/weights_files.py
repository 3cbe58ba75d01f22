"""Foreign weights files: read without running anything in them, named as the model names them, and all there."""

import os
from pathlib import Path

from torch import Tensor, nn

from meddino.checkpoints.weights.load import timm_names
from meddino.checkpoints.weights.weight_files import read_weights_file
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.logging import get_logger
from meddino_evaluation.backbones.catalogue import Entry

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".torch")
_log = get_logger(__name__)


def weights_folder() -> Path:
    """Return the folder in which pretrained weights are looked for: $MEDDINO_WEIGHTS, or ~/.cache/meddino/weights."""
    return Path(os.environ.get("MEDDINO_WEIGHTS") or Path.home() / ".cache" / "meddino" / "weights")


def find_weights(name: str, entry: Entry) -> Path:
    """Return the weights file of a catalogue entry.

    Raises:
        ConfigError: It is not there; says which file to put where, and from where it comes.
    """
    folder = weights_folder()
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    what = f"{entry.library} {entry.architecture}"
    raise ConfigError(
        f"model '{name}' needs its pretrained weights, and nothing is downloaded: put the file as {folder / name}.safetensors "
        f"(or .pth; {what}, from {entry.source}, licence {entry.licence}), or name it: {name}@FILE; "
        f"random:{name} runs it with random weights; `meddino-eval weights` lists them all (docs/weights.md)"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a torch file of plain tensors (no object in it is ever run).

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but tensors; says which and what to do.
    """
    return read_weights_file(path).tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], prefixes: tuple[str, ...], where: str) -> None:
    """Fill a model, all of it, from tensors under foreign names.

    Args:
        model: Built without a classifier.
        tensors: From `read_weights`.
        prefixes: See `Entry.prefixes`.
        where: For messages.

    Raises:
        CheckpointError: A parameter of the model is not in the file or has another shape: names them. What the model
            does not have (text tower, classifier, decoder) is left out, and said in the log.
    """
    for prefix in (*prefixes, "module.", "backbone."):
        inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if inside:
            tensors = inside
            break
    tensors = timm_names(model, tensors)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or wrong:
        few = ", ".join([*missing[:4], *wrong[:4]])
        raise CheckpointError(
            f"{where} does not fit: {len(missing)} of the model's {len(wanted)} tensors are missing and {len(wrong)} have "
            f"another shape ({few}); nothing was loaded"
        )
    surplus = [name for name in tensors if name not in wanted]
    if surplus:
        _log.info("%s: %d tensors that the backbone does not have are left out (%s ...)", where, len(surplus), surplus[0])
    model.load_state_dict({name: tensors.get(name, value) for name, value in wanted.items()}, strict=True)
