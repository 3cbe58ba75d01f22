"""What the trainer asks of an objective. Another objective is another module beside this one and a line in `__init__`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from meddino_pretrain.data.batches import Batch
from meddino_pretrain.schedules import StepValues

Losses = Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Views:
    """Which views of a slice an objective learns from; the stage's crops must offer them.

    Attributes:
        local_crops: Small crops.
        masks: Masks over the global crops' patches.
        gram_teacher_crops: The global crops again, larger and undistorted.
    """

    local_crops: bool
    masks: bool
    gram_teacher_crops: bool


class Objective(Protocol):
    """A self-supervised objective with its networks."""

    @property
    def views(self) -> Views:
        """Which views it needs."""
        ...

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """The trained modules by name: each is clipped on its own, and "backbone" gets the layer-wise decay."""
        ...

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What a checkpoint holds, by name; the export takes `teacher.backbone`."""
        ...

    def losses(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[Losses]:
        """Yield the weighted terms and their sum "total" of each micro-batch of one optimizer step.

        The caller goes backward through each "total", divided by the number of micro-batches, before it asks for the
        next. What belongs to the whole batch (targets, neighbours) spans all micro-batches and all processes.

        Args:
            batches: The step's micro-batches.
            values: The step's scheduled values.
            step: Step within the stage, from 0: seeds what is random in the forward pass.
        """
        ...

    def after_step(self, values: StepValues) -> None:
        """Do what follows the optimizer: move the teacher."""
        ...

    def observations(self) -> Mapping[str, Tensor]:
        """Return what was seen in the last step and is worth a line in the metrics, 0-d tensors."""
        ...
