"""One loop for whatever is trained on a backbone: heads on frozen features, fine-tuned classifiers, segmentation networks.

The loss of a step is a pure function of the step, so a training that was killed goes on where it was saved. What is held is
checked to have been held, and where validation selects, the best weights are kept.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from meddino.core.errors import CheckpointError, MedDINOError
from meddino.core.files import atomic_write, canonical_json
from meddino_evaluation.adaptation.trainable import held_tensors
from meddino_evaluation.backbones.adapter import Backbone

_NOTES = "meddino"
State = dict[str, Tensor]


@dataclass(frozen=True)
class StepRecord:
    """One line of a training log."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None


@dataclass
class FitLoop:
    """Runs the steps.

    Attributes:
        module: What is trained.
        optimizer: Over what learns of it.
        set_rates: Sets the learning rates of a step; called once for each step, in order.
        loss_of: The loss of a step.
        steps: How many.
        clip_norm: Largest norm of all gradients together; None leaves them as they are.
        only_finite: Stop with an error at a loss or gradient that is no number.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    set_rates: Callable[[int], None]
    loss_of: Callable[[int], Tensor]
    steps: int
    clip_norm: float | None = None
    only_finite: bool = True

    def fit(self, on_step: Callable[[StepRecord], bool] = lambda record: True, start: int = 0) -> None:
        """Train.

        Args:
            on_step: Called after each step; False ends the training.
            start: Steps that an earlier, killed training has done.

        Raises:
            MedDINOError: The loss is no number; nothing of that step is kept.
        """
        for step in range(start):
            self.set_rates(step)
        for step in range(start, self.steps):
            self.set_rates(step)
            loss = self.loss_of(step)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = None if self.clip_norm is None else float(nn.utils.clip_grad_norm_(self.learning(), self.clip_norm))
            value = float(loss.detach())
            if self.only_finite and not (math.isfinite(value) and math.isfinite(norm or 0.0)):
                raise MedDINOError(
                    f"step {step}: the loss is {value}, the gradients' norm {norm}; nothing of this step was kept; try smaller "
                    "learning rates (training.lr_head, training.lr_encoder, finetune.*_lr), or precision=fp32"
                )
            self.optimizer.step()
            if not on_step(StepRecord(step, value, self.optimizer.param_groups[0]["lr"], norm)):
                break

    def learning(self) -> list[nn.Parameter]:
        """Return what learns, in a fixed order."""
        return _learning(self.module)


class Clock:
    """Tells how long a training of several parts will still take, from the steps that were timed.

    Args:
        steps: Of all parts together.
    """

    TIMED_STEPS = 20
    """So many steps are timed before anything is said: the first ones also read, compile and warm up."""

    def __init__(self, steps: int) -> None:
        self.left, self.done, self._start_s = steps, 0, time.monotonic()

    def tick(self) -> None:
        """Count a step."""
        self.left, self.done = self.left - 1, self.done + 1

    def text(self) -> str:
        """Return what is left in words, e.g. "about 12 min left"; "" while too little was timed."""
        if self.done < self.TIMED_STEPS:
            return ""
        seconds = (time.monotonic() - self._start_s) / self.done * self.left
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


def linear_decay(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
    """Return rates that fall from each group's own linearly to zero, without a warm-up."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - step / steps)

    return set_rates


def cosine_decay(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
    """Return rates that fall from each group's own to zero along half a cosine."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def set_rates(step: int) -> None:
        if step:
            scheduler.step()

    return set_rates


def learned_state(module: nn.Module, buffers_under: str = "") -> State:
    """Return what training may change: parameters that learn, and saved buffers under a prefix (running statistics)."""
    # By named_parameters: MONAI's DynUNet holds its layers under two names, and each is wanted once.
    learned: State = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return learned | {name: value for name, value in module.named_buffers() if name.startswith(buffers_under)}


class BestCheckpoint:
    """Keeps what learned at its best validation score.

    Args:
        state: Gives what may change.
        module: Gets it back.

    Attributes:
        score: The best so far; None before the first that is defined.
        validations_without_gain: Since the best one.
    """

    def __init__(self, state: Callable[[], State], module: nn.Module) -> None:
        self._state, self._module = state, module
        self.score: float | None = None
        self.kept: State | None = None
        self.validations_without_gain = 0

    def update(self, score: float) -> bool:
        """Keep the weights as they are now if their score is the best; tell whether it was."""
        self.validations_without_gain += 1
        if self.score is not None and score <= self.score:
            return False
        self.score, self.validations_without_gain = score, 0
        self.kept = {name: value.detach().clone() for name, value in self._state().items()}
        return True

    def restore(self) -> None:
        """Put the best weights back."""
        if self.kept is not None:
            self._module.load_state_dict(self.kept, strict=False)


class FreezeCheck:
    """Looks at a network before and after training: what is held is identical, what learns has moved.

    Args:
        backbone: Its held tensors are compared by hash.
        parts: What learns, by name; of each at least one parameter that learns must move.
        all_buffers: Statistics of batch norms are held even where their scale and shift learn.
    """

    def __init__(self, backbone: Backbone, parts: Mapping[str, nn.Module], *, all_buffers: bool = False) -> None:
        self._backbone, self._parts, self._all_buffers = backbone, parts, all_buffers
        self._held = self._digests()
        self._before = {name: [one.detach().clone() for one in _learning(part)] for name, part in parts.items()}

    def check(self, mode: str) -> None:
        """Raise if a held tensor moved, or nothing of a learning part did: a fault of ours, not the user's."""
        now = self._digests()
        moved = [name for name, digest in self._held.items() if digest != now[name]]
        if moved:
            raise RuntimeError(f"mode {mode}: held tensors of the encoder moved: {moved[:5]}")
        for name, before in self._before.items():
            if all(torch.equal(old, new) for old, new in zip(before, _learning(self._parts[name]), strict=True)):
                raise RuntimeError(f"mode {mode}: {name} was to learn, but none of its {len(before)} weights moved")

    def _digests(self) -> dict[str, str]:
        buffers = self._backbone.named_buffers() if self._all_buffers else ()
        return _digests([*held_tensors(self._backbone), *buffers])


def save_state(path: Path, state: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors and texts, atomically."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as stream:
        # One key: safetensors writes several in an order that changes from process to process.
        stream.write(save(plain, metadata={_NOTES: canonical_json(dict(notes))}))


def load_state(module: nn.Module, path: Path, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Fill a freshly built network with what it had learned.

    Returns:
        The texts beside the tensors.

    Raises:
        CheckpointError: The file is missing, damaged or of another network.
    """
    try:
        tensors, notes = load_file(path), _read_notes(path)
        # Until every encoder was a `network`, ours was called `vit` and the others had only their library's `model`.
        tensors = {re.sub(r"^backbone\.(vit\.)?(?!network\.)", "backbone.network.", name): one for name, one in tensors.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; delete it and run the same command again") from error
    lacking = sorted(wanted.keys() - tensors.keys())
    wrong = sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    if lacking or wrong or tensors.keys() - wanted.keys():
        raise CheckpointError(
            f"{path} is of another network: lacks {lacking[:3]}, other shapes {wrong[:3]}; delete it and run again"
        )
    module.load_state_dict(tensors, strict=False)
    return notes


def is_of(path: Path, identity: str) -> bool:
    """Tell whether a file belongs to this run; a damaged file does not."""
    try:
        return path.is_file() and _read_notes(path).get("identity") == identity
    except (OSError, ValueError, SafetensorError):
        return False


def save_progress(path: Path, step: int, loop: FitLoop, state: State, best: BestCheckpoint | None, identity: str) -> None:
    """Save a training after a step."""
    tensors = {f"network.{name}": value for name, value in state.items()}
    notes: dict[str, float | int | None] = {"step": step}
    if best is not None:
        tensors |= {f"best.{name}": value for name, value in (best.kept or {}).items()}
        notes |= {"score": best.score, "validations_without_gain": best.validations_without_gain}
    for number, parameter in enumerate(loop.learning()):
        for name, value in loop.optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    save_state(path, tensors, {"identity": identity, "progress": json.dumps(notes)})


def load_progress(path: Path, loop: FitLoop, best: BestCheckpoint | None, identity: str) -> int:
    """Put a training back to its last save and return the steps that it had done; 0 if there is no save of this run."""
    if not is_of(path, identity):
        return 0
    notes = json.loads(_read_notes(path)["progress"])
    parts: dict[str, State] = {"network": {}, "best": {}, "optimizer": {}}
    for name, value in load_file(path).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    loop.module.load_state_dict(parts["network"], strict=False)
    for number, parameter in enumerate(loop.learning()):
        own = {name.partition(".")[2]: value for name, value in parts["optimizer"].items() if name.startswith(f"{number}.")}
        moved = {name: value if name == "step" else value.to(parameter.device) for name, value in own.items()}
        loop.optimizer.state[parameter] = moved
    if best is not None:
        best.score, best.kept = notes["score"], parts["best"] or None
        best.validations_without_gain = notes["validations_without_gain"]
    return int(notes["step"])


def _read_notes(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = json.loads((file.metadata() or {}).get(_NOTES, "{}"))
        return found


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    digests = {}
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digests[name] = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return digests
