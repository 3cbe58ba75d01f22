"""One micro-batch of one rank: as the workers make it, and as the model takes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

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
        boxes: Kind of view -> [V B, 5] top, left, height, width [px of the slice], 1 if flipped; where the method wants them.
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
    boxes: dict[str, Int32[Tensor, "_rows 5"]] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank on the device, ready for the model. Crop-major: row `view * batch + sample`.

    Attributes:
        step: Optimizer step.
        micro_step: Number of the micro-batch within the step.
        views: Kind of view -> [V B, C, H, W] normalised.
        keys: The B slices' keys.
        boxes: See `RawBatch`.
        extras: See `RawBatch`.
        corrupt: See `RawBatch`.
        data_wait_s: How long the training process waited for it.
    """

    step: int
    micro_step: int
    views: dict[str, Float[Tensor, "_rows _c _h _w"]]
    keys: list[str]
    boxes: dict[str, Int32[Tensor, "_rows 5"]] = field(default_factory=dict)
    extras: dict[str, Shaped[Tensor, "..."]] = field(default_factory=dict)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    data_wait_s: float = 0.0


def to_model_input(raw: RawBatch, spec: ViewSpec, machine: Machine, intensities: Intensities) -> Batch:
    """Move a raw batch to the device and do its point-wise intensity work there, whole batches at a time."""

    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(machine.device, non_blocking=True) for name, tensor in tensors.items()}

    stored = there(raw.views)
    views = {}
    for name, view in spec.views.items():
        images = intensities.apply(stored[name], raw.intensity[name], undistorted=not view.augmented)
        views[name] = images.to(machine.weight_dtype)
    return Batch(
        step=raw.step,
        micro_step=raw.micro_step,
        views=views,
        keys=raw.keys,
        boxes=there(raw.boxes),
        extras=there(raw.extras),
        corrupt=raw.corrupt,
        data_wait_s=raw.data_wait_s,
    )
