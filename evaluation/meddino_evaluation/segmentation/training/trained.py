"""What a training leaves behind: weights under the identity of their run, and saves from which a killed one goes on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_write, canonical_json
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork, learned_state
from meddino_evaluation.segmentation.training.loop import Trainer

NOTES = "meddino"


@dataclass(frozen=True)
class Progress:
    """Where a killed training stood: steps done and what selection had kept."""

    step: int
    best_dice: float | None
    best: dict[str, Tensor] | None
    validations_without_gain: int


def weights_path(out: Path, fold: int, seed: int) -> Path:
    """Return where the weights of a fold and seed lie."""
    return out / "weights" / f"fold-{fold}_seed-{seed}.safetensors"


def save_network(network: SegmentationNetwork, path: Path, identity: str, components: Sequence[str] = ()) -> None:
    """Write what learned, under the identity of the run it belongs to.

    Args:
        network: Encoder and head.
        path: File.
        identity: Of the run; another one is never taken up.
        components: Labels of which only the largest component is kept.
    """
    _write(path, learned_state(network), {"identity": identity, "largest_component": json.dumps(list(components))})


def load_network(network: SegmentationNetwork, path: Path) -> tuple[str, ...]:
    """Fill a freshly built network with what it had learned.

    Returns:
        The labels of which only the largest component is kept.

    Raises:
        CheckpointError: The file is missing, damaged or of another network.
    """
    try:
        tensors = load_file(path)
        metadata = read_metadata(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; delete it and run the same command again") from error
    wanted = learned_state(network)
    lacking = sorted(wanted.keys() - tensors.keys())
    wrong = sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    if lacking or wrong or tensors.keys() - wanted.keys():
        raise CheckpointError(
            f"{path} is of another network: lacks {lacking[:3]}, other shapes {wrong[:3]}; delete it and run again"
        )
    network.load_state_dict(tensors, strict=False)
    return tuple(json.loads(metadata.get("largest_component", "[]")))


def is_trained(path: Path, identity: str) -> bool:
    """Tell whether a file holds the weights of this run; a damaged file does not."""
    try:
        return path.is_file() and read_metadata(path).get("identity") == identity
    except (OSError, ValueError, SafetensorError):
        return False


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts beside the tensors."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = json.loads((file.metadata() or {}).get(NOTES, "{}"))
        return found


def save_progress(path: Path, trainer: Trainer, progress: Progress, identity: str) -> None:
    """Save a training after a step."""
    tensors = {f"network.{name}": value for name, value in learned_state(trainer.network).items()}
    tensors |= {f"best.{name}": value for name, value in (progress.best or {}).items()}
    for number, parameter in enumerate(trainer.learning()):
        for name, value in trainer.optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    notes = {
        "step": progress.step,
        "best_dice": progress.best_dice,
        "validations_without_gain": progress.validations_without_gain,
    }
    _write(path, tensors, {"identity": identity, "progress": json.dumps(notes)})


def load_progress(path: Path, trainer: Trainer, identity: str) -> Progress | None:
    """Put a training back to its last save; None if there is none of this run."""
    if not is_trained(path, identity):
        return None
    notes = json.loads(read_metadata(path)["progress"])
    tensors = load_file(path)
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    trainer.network.load_state_dict(parts["network"], strict=False)
    for number, parameter in enumerate(trainer.learning()):
        own = {
            name.partition(".")[2]: value for name, value in parts["optimizer"].items() if name.partition(".")[0] == str(number)
        }
        moved = {name: value if name == "step" else value.to(parameter.device) for name, value in own.items()}
        trainer.optimizer.state[parameter] = moved
    return Progress(notes["step"], notes["best_dice"], parts["best"] or None, notes["validations_without_gain"])


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as stream:
        # One key: safetensors writes several in an order that changes from process to process.
        stream.write(save(plain, metadata={NOTES: canonical_json(metadata)}))
