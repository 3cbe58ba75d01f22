"""All that trainer, loader and monitor know of a method. A new one is a folder beside `dinov3` and a row of METHODS."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.checkpoints.state.training_state import load_training_state
from meddino.core.device import Machine
from meddino.distributed.parallel import gradient_sync
from meddino.models.backbone import Backbone
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.methods.config import Action
from meddino_pretrain.schedules import StepValues

Losses = Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class StageSetting:
    """What a method is told of the stage it works in.

    Attributes:
        steps: Length of the stage.
        seed: The stage's seed, for what is random in forward passes.
        share: Which samples of a step are in which micro-batch of this process.
        machine: Where and in which arithmetic forward passes run.
    """

    steps: int
    seed: int
    share: BatchShare
    machine: Machine


@dataclass(frozen=True)
class ProbeOutput:
    """What the exported backbone sees in some slices.

    Attributes:
        cls_token: [n, D].
        patch_map: [n, D, rows, columns]; None where the backbone has no patch tokens.
        assignments: Name -> logits of a soft assignment, a row a token, divided by their temperature: measured for collapse.
    """

    cls_token: Float[Tensor, "n d"]
    patch_map: Float[Tensor, "n d h w"] | None
    assignments: Mapping[str, Float[Tensor, "_rows _k"]] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptChoice:
    """Which kept backbone a stage takes, and what follows.

    Attributes:
        step: Step after which it was kept.
        degraded: True if patch quality fell from there to the last one.
        action: What the stage shall do.
        message: Why, in a sentence for people.
        curve: Mean score by step.
    """

    step: int
    degraded: bool
    action: Action
    message: str
    curve: dict[int, float]


class Method(ABC):
    """A self-supervised method with its networks.

    Attributes:
        model: The trained network. Its `forward(batch, target)` is all that has a gradient, losses included, so that wrappers
            which gather parameters or exchange gradients (FSDP2, DDP) see one call. Modules with other methods that are
            called like `forward` name them in an attribute `forward_methods`.
        called: The same behind a wrapper that exchanges gradients, where there is one.
        machine: Where it runs.
        lr_schedules: Names within parameters' dotted names whose learning rate `lr_multipliers` changes.
    """

    lr_schedules: ClassVar[tuple[str, ...]] = ()
    model: nn.Module
    called: nn.Module
    machine: Machine

    @classmethod
    @abstractmethod
    def views(cls, config: Any) -> ViewSpec:
        """Return which views of a slice the method learns from."""

    @classmethod
    def collate(cls, config: Any, patch_px: int, raw: RawBatch, order: SampleOrder) -> RawBatch:
        """Add what else a micro-batch holds (masks, pairs, ...), as `extras`; runs in the loader's workers.

        It must be a function of `order.seed`, the step and the samples alone, or ranks, workers and resuming change the run.

        Args:
            config: The method's part of the recipe.
            patch_px: Pixels between the backbone's patch tokens.
            raw: The views.
            order: Seed and size of a step.
        """
        return raw

    @classmethod
    @abstractmethod
    def build(cls, config: Any, backbone: Backbone, setting: StageSetting) -> "Method":
        """Make the networks, with fresh weights on the current default device.

        Args:
            config: The method's part of the recipe.
            backbone: With fresh weights; belongs to the method from now on.
            setting: The stage.

        Raises:
            ConfigError: The backbone cannot be trained in this way.
        """

    @classmethod
    def choose_kept(cls, config: Any, scores: Mapping[int, Float[Tensor, " n"]]) -> KeptChoice:
        """Choose among an earlier stage's kept backbones; asked where `config.kept_backbone.step` is None.

        Args:
            config: The method's part of the recipe.
            scores: Step -> patch quality on the same fixed slices; the last step is the end of the stage.
        """
        raise NotImplementedError

    @abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """Return what a checkpoint holds, by name."""

    def parts(self) -> list[nn.Module]:
        """Return the modules that are compiled one at a time, of frozen networks too."""
        return [part for backbone in backbones_in(self.networks()).values() for part in backbone.parts()]

    def trainable(self) -> Mapping[str, nn.Module]:
        """Return the trained modules by name: each is clipped on its own, and a `Backbone` gets the layer-wise decay."""
        return dict(self.model.named_children())

    @abstractmethod
    def export(self) -> Backbone:
        """Return the backbone that is exported, kept and probed; it lies in one of `networks()`."""

    def load_stage(self, folder: Path, kept: Path | None) -> None:
        """Take over what an earlier stage of the same method ended with.

        Args:
            folder: Its last checkpoint.
            kept: The earlier stage's backbone that `config.kept_backbone` asks for.
        """
        load_training_state(folder, self.networks())

    def scheduled(self, step: int) -> Mapping[str, float]:
        """Return the method's own values of a step (momentum, temperature, ...) by name; they are recorded."""
        return {}

    def lr_multipliers(self, step: int) -> Mapping[str, float]:
        """Return factors on the learning rate of parameters by a part of their dotted name; see `lr_schedules`."""
        return {}

    def targets(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterable[Any]:
        """Return what the model shall match in each micro-batch, one after the other.

        What belongs to the whole batch is computed at once; what one micro-batch alone needs when it is asked for.
        """
        return [None] * len(batches)

    def losses(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[Losses]:
        """Yield the terms (detached) and their weighted sum "total" of each micro-batch of one optimizer step.

        The caller goes backward through each "total", divided by the number of micro-batches, before it asks for the next.

        Args:
            batches: The step's micro-batches.
            values: The step's scheduled values.
            step: Step within the stage, from 0: seeds what is random in the forward pass.
        """
        self.model.train()
        targets = iter(self.targets(batches, values, step))
        for number, batch in enumerate(batches):
            # Held open while the caller goes backward, which is when gradients are exchanged.
            with gradient_sync(self.called, number == len(batches) - 1), self.machine.autocast():
                # The graph alone holds a target now, and lets go as soon as it has used it.
                losses: Losses = self.called(batch, next(targets))
                yield losses

    def after_step(self, values: StepValues) -> None:  # noqa: B027
        """Do what follows the optimizer: move a teacher."""

    def observations(self) -> Mapping[str, Tensor]:
        """Return what was seen in the last step and is worth a line in the metrics, 0-d tensors."""
        return {}

    def probe(self, images: Float[Tensor, "n c h w"]) -> ProbeOutput:
        """Return what the exported backbone sees in images, without a gradient."""
        backbone = self.export()
        training = backbone.training
        seen = backbone.eval().tokens(images)
        backbone.train(training)
        return ProbeOutput(seen.cls_token, seen.patch_map)

    def flops(self, batch: Batch) -> float:
        """Return the operations that a step's matrix products need on a micro-batch, whatever is computed twice.

        Asked of a method from `shapes_of`. As it stands: the backbone's forward pass on all views three times, for
        its backward pass has two products for each of the forward.
        """
        backbone = self.export()
        return 3 * sum(count_flops(partial(backbone.tokens, images)) for images in on_meta(batch).values())


def shapes_of(build: Callable[[], Method]) -> Method:
    """Return a method whose networks have shapes alone, in evaluation mode: for counting."""
    with torch.device("meta"):
        method = build()
    for network in method.networks().values():
        network.eval()
    return method


def on_meta(batch: Batch) -> dict[str, Tensor]:
    """Return a batch's views as shapes alone."""
    # In the type of the weights of `shapes_of`, whatever is trained in.
    return {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in batch.shapes.items()}


def count_flops(work: Callable[[], object]) -> float:
    """Return the operations of the matrix products that a call makes, which may run on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return float(counter.get_total_flops())


def backbones_in(networks: Mapping[str, nn.Module]) -> dict[str, Backbone]:
    """Return every backbone inside some networks by its dotted name."""
    return {
        f"{name}.{inner}" if inner else name: module
        for name, network in networks.items()
        for inner, module in network.named_modules()
        if isinstance(module, Backbone)
    }
