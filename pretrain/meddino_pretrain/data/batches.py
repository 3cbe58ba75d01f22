"""One micro-batch of one rank: as the workers make it, and as the model takes it."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from meddino.core.device import Machine
from meddino_pretrain.data.config import CropSizes
from meddino_pretrain.data.intensities import Intensities


@dataclass(frozen=True)
class RawBatch:
    """One micro-batch of one rank as the workers make it: stored values on the host, of CT int16.

    Crop-major everywhere: row `crop * batch + sample`.

    Attributes:
        step: Optimizer step.
        micro_step: Number of the micro-batch within the step.
        sizes: The step's crop sizes.
        global_stored: [2 B, H, W], or with 3 channels where pictures may have colour.
        local_stored: [L B, h, w].
        gram_stored: [2 B, H', W'] cut from the undistorted slices by the global crops' boxes, or None.
        global_intensity: [2 B, columns]; see `Intensities.draw`.
        local_intensity: [L B, columns].
        masks: [2 B, N].
        mask_indices: [M] places of the masked patches in the flattened masks.
        mask_weights: [M] 1 / (masked patches in the same crop).
        keys: The B slices' keys.
        damaged: (key, what is wrong) of each damaged slice that was stood in for.
        data_wait_s: How long the training process waited for this batch.
    """

    step: int
    micro_step: int
    sizes: CropSizes
    global_stored: Shaped[Tensor, "gb *c h w"]
    local_stored: Shaped[Tensor, "lb *c h2 w2"]
    gram_stored: Shaped[Tensor, "gb *c h3 w3"] | None
    global_intensity: Float[Tensor, "gb columns"]
    local_intensity: Float[Tensor, "lb columns"]
    masks: Bool[Tensor, "gb n"]
    mask_indices: Int64[Tensor, " m"]
    mask_weights: Float[Tensor, " m"]
    keys: list[str]
    damaged: list[tuple[str, str]] = field(default_factory=list)
    data_wait_s: float = 0.0

    def pin_memory(self) -> "RawBatch":
        """Return the batch in page-locked memory; DataLoader calls this where there is an accelerator."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank on the device, ready for the model. Crop-major: row `crop * batch + sample`.

    Attributes:
        step: Optimizer step.
        micro_step: Number of the micro-batch within the step.
        global_crops: [2 B, C, H, W] normalised.
        local_crops: [L B, C, h, w] normalised.
        gram_teacher_crops: [2 B, C, H', W'] normalised and undistorted, or None.
        masks: [2 B, N], True where the student does not see a patch.
        mask_indices: [M] places of the masked patches in the flattened masks.
        mask_weights: [M] 1 / (masked patches in the same crop).
        keys: The B slices' keys.
        data_wait_s: How long the training process waited for it.
        damaged: (key, what is wrong) of each damaged slice that was stood in for.
    """

    step: int
    micro_step: int
    global_crops: Float[Tensor, "gb c h w"]
    local_crops: Float[Tensor, "lb c h2 w2"]
    gram_teacher_crops: Float[Tensor, "gb c h3 w3"] | None
    masks: Bool[Tensor, "gb n"]
    mask_indices: Int64[Tensor, " m"]
    mask_weights: Float[Tensor, " m"]
    keys: list[str]
    data_wait_s: float
    damaged: list[tuple[str, str]] = field(default_factory=list)


def to_model_input(raw: RawBatch, machine: Machine, intensities: Intensities) -> Batch:
    """Move a raw batch to the device and do its point-wise intensity work there, whole batches at a time."""

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(machine.device, non_blocking=True)

    def images(stored: Tensor, rows: Tensor, undistorted: bool = False) -> Tensor:
        return intensities.apply(there(stored), rows, undistorted).to(machine.weight_dtype)

    gram = None
    if raw.gram_stored is not None:
        gram = images(raw.gram_stored, raw.global_intensity, undistorted=True)
    return Batch(
        step=raw.step,
        micro_step=raw.micro_step,
        global_crops=images(raw.global_stored, raw.global_intensity),
        local_crops=images(raw.local_stored, raw.local_intensity),
        gram_teacher_crops=gram,
        masks=there(raw.masks),
        mask_indices=there(raw.mask_indices),
        mask_weights=there(raw.mask_weights),
        keys=raw.keys,
        data_wait_s=raw.data_wait_s,
        damaged=raw.damaged,
    )
