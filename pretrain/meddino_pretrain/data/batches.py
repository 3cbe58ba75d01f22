"""One micro-batch of one rank: as the workers make it, and as the model takes it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from meddino.core.device import Machine
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.data.views import ViewSpec


@dataclass(frozen=True)
class RawBatch:
    """One micro-batch of one rank as the workers make it: stored values on the host.

    Crop-major everywhere: row `view * batch + sample`.

    Attributes:
        step: Optimizer step.
        micro_step: Number of the micro-batch within the step.
        samples: The samples' numbers within the step.
        views: Kind of view -> [V B, H, W] stored values; [V B, 3, H, W] where pictures may have colour.
        intensity: Kind of view -> [V B, columns]; see `Intensities.draw`.
        boxes: Kind of view -> [V B, 7] top, left, height, width [px of the slice], 1 if flipped, rows and columns of the
            slice; where the method wants them.
        extras: What the method's `collate` added.
        keys: The B slices' keys.
        corrupt: (key, what is wrong) of each corrupt sample that another was taken for.
        data_wait_s: How long the training process waited for this batch.
    """

    step: int
    micro_step: int
    samples: range
    views: dict[str, Shaped[Tensor, "_rows *_c _h _w"]]
    intensity: dict[str, Float[Tensor, "_rows _columns"]]
    keys: list[str]
    boxes: dict[str, Int32[Tensor, "_rows 7"]] = field(default_factory=dict)
    extras: dict[str, Shaped[Tensor, "..."]] = field(default_factory=dict)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    data_wait_s: float = 0.0

    def pin_memory(self) -> "RawBatch":
        """Return the batch in page-locked memory; DataLoader calls this where there is an accelerator."""

        def pinned(value: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in value.items()}

        changed: dict[str, Any] = {
            f.name: pinned(value) for f in fields(self) if isinstance(value := getattr(self, f.name), dict)
        }
        return replace(self, **changed)


Collate = Callable[[RawBatch, SampleOrder], RawBatch]


class ModelInput(Mapping[str, Tensor]):
    """Kind of view -> [V B, C, H, W] normalised, made on the device when it is asked for.

    Views of a step that is computed in one piece are kept, for they are asked for twice; those of several micro-batches are
    made anew each time and live as long as somebody holds them, so that they never lie on the device all at once.
    """

    def __init__(self, make: Callable[[str], Tensor], shapes: Mapping[str, torch.Size], keep: bool) -> None:
        """Say how.

        Args:
            make: Makes a kind of view.
            shapes: What it will make.
            keep: Whether to keep what was made.
        """
        self.shapes = shapes
        self._make, self._keep = make, keep
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            made = self._make(name)
            if not self._keep:
                return made
            self._kept[name] = made
        return self._kept[name]

    def take(self, name: str) -> Tensor:
        """Return a kind of view to whoever asks for it last: nobody else holds it any more."""
        made = self[name]
        self._kept.pop(name, None)
        return made

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank on the device, ready for the model. Crop-major: row `view * batch + sample`.

    Attributes:
        step: Optimizer step.
        micro_step: Number of the micro-batch within the step.
        views: Kind of view -> [V B, C, H, W] normalised; ask for each once, see `ModelInput`.
        keys: The B slices' keys.
        boxes: See `RawBatch`.
        extras: See `RawBatch`.
        corrupt: See `RawBatch`.
        data_wait_s: How long the training process waited for it.
    """

    step: int
    micro_step: int
    views: Mapping[str, Float[Tensor, "_rows _c _h _w"]]
    keys: list[str]
    boxes: dict[str, Int32[Tensor, "_rows 7"]] = field(default_factory=dict)
    extras: dict[str, Shaped[Tensor, "..."]] = field(default_factory=dict)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    data_wait_s: float = 0.0

    def take(self, name: str) -> Float[Tensor, "_rows _c _h _w"]:
        """Return a kind of view that is not asked for again in this step, so that it lives no longer than it is used."""
        return self.views.take(name) if isinstance(self.views, ModelInput) else self.views[name]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The views' shapes, without making them."""
        return self.views.shapes if isinstance(self.views, ModelInput) else {name: v.shape for name, v in self.views.items()}


def to_model_input(raw: RawBatch, spec: ViewSpec, machine: Machine, intensities: Intensities, keep: bool = True) -> Batch:
    """Prepare a raw batch's move to the device; its point-wise intensity work is done there, whole batches at a time.

    Args:
        raw: From the workers.
        spec: What the views are.
        machine: Where to.
        intensities: Make model input of stored values.
        keep: Whether views stay on the device once they are made; see `ModelInput`.
    """

    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(machine.device, non_blocking=True) for name, tensor in tensors.items()}

    def make(name: str) -> Tensor:
        stored = raw.views[name].to(machine.device, non_blocking=True)
        images = intensities.apply(stored, raw.intensity[name], undistorted=not spec.views[name].augmented)
        return images.to(machine.weight_dtype)

    channels = intensities.contracts[0].channels
    shapes = {name: torch.Size((len(raw.views[name]), channels, *raw.views[name].shape[-2:])) for name in spec.views}
    return Batch(
        step=raw.step,
        micro_step=raw.micro_step,
        views=ModelInput(make, shapes, keep),
        keys=raw.keys,
        boxes=there(raw.boxes),
        extras=there(raw.extras),
        corrupt=raw.corrupt,
        data_wait_s=raw.data_wait_s,
    )
