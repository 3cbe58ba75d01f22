"""What a backbone is to everybody else: tokens of images, layers from input to output, an architecture to build again."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meddino.core.config import StrictConfig
from meddino.layers.drop_path import DropPathPlan


@dataclass(frozen=True)
class BackboneOutput:
    """Normalised tokens of images of one size.

    Attributes:
        cls_token: [B, D]; of a network without a CLS token, the mean over its patch tokens.
        register_tokens: [B, R, D]; R may be 0.
        patch_tokens: [B, N, D], rows of patches (of cells of the last map, in a convolutional network) one after the other.
        grid: Rows and columns of patches; their product is N.
    """

    cls_token: Float[Tensor, "batch dim"]
    register_tokens: Float[Tensor, "batch registers dim"]
    patch_tokens: Float[Tensor, "batch patches dim"]
    grid: tuple[int, int]

    @property
    def patch_map(self) -> Float[Tensor, "batch dim rows columns"]:
        """The patch tokens as a map."""
        return self.patch_tokens.transpose(1, 2).reshape(len(self.patch_tokens), -1, *self.grid)

    def __repr__(self) -> str:
        tokens = ("cls_token", "register_tokens", "patch_tokens")
        shapes = ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in tokens)
        return f"BackboneOutput({shapes}, grid {self.grid[0]} x {self.grid[1]})"


@dataclass(frozen=True)
class LayerGroup:
    """Parameters of a backbone that lie equally deep.

    Attributes:
        name: For people and logs.
        distance: Layers between the group and the output; 0 is the output's own. The learning rate decays by it.
        parameters: Names within the backbone.
        module: Called as a whole, once a forward pass, so that it can be sharded, compiled and recomputed by itself; None
            where there is no such module.
        is_stem: The layer that reads pixels, which recipes may train more slowly.
    """

    name: str
    distance: int
    parameters: tuple[str, ...]
    module: nn.Module | None = None
    is_stem: bool = False


class Backbone(nn.Module, ABC):
    """A network from images to tokens.

    Attributes:
        config: The architecture: `registry.backbone_from_config` builds it again; checkpoints and exports carry it.
        embed_dim: Width of all tokens of `BackboneOutput`.
        patch_size: Pixels between patch tokens: a vision transformer's patch, a convolutional network's stride.
        multiple_px: Image sides must be multiples of this.
        depth: Number of blocks that `get_intermediate_layers` can give.
        is_sequence: Whether all blocks give tokens of one width and grid; else they are stages, each with its own stride.
        fixed_px: The only size [rows, columns] that images may have, or None.
        recomputes: Whether all activations are computed again in the backward pass; see `recompute_activations`.
    """

    config: StrictConfig
    embed_dim: int
    patch_size: int
    multiple_px: int
    depth: int
    is_sequence: bool = True
    fixed_px: tuple[int, int] | None = None
    recomputes: bool = False

    def tokens(
        self, images: Float[Tensor, "batch channels height width"], *, plan: DropPathPlan | None = None
    ) -> BackboneOutput:
        """Return the tokens of images of one size; a call of the module, so that wrappers and hooks see it.

        Args:
            images: Normalised by the model's input contract.
            plan: In training, what is random in the forward pass as a function of the samples' numbers in the global batch.
        """
        output: BackboneOutput = self(images, plan=plan)
        return output

    @abstractmethod
    def get_intermediate_layers(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[Float[Tensor, "batch _dim _rows _columns"]]:
        """Return the patch tokens after some blocks as maps.

        Args:
            images: See `tokens`.
            blocks: Which blocks, from 0; negative ones count from the end.
            norm: Apply the last norm to each, where the network has one that fits.

        Raises:
            ValueError: If a block does not exist.
        """

    @abstractmethod
    def intermediate_outputs(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[BackboneOutput]:
        """Return all tokens after some blocks; see `get_intermediate_layers`, which gives the patch tokens as maps."""

    @abstractmethod
    def layer_groups(self) -> list[LayerGroup]:
        """Return the parameters that the tokens depend on from input to output, each in one group; frozen or not."""

    def parts(self) -> list[nn.Module]:
        """Return the modules that are sharded, compiled and recomputed one at a time, from input to output."""
        return [group.module for group in self.layer_groups() if group.module is not None]

    def recompute_activations(self, selective: bool = False) -> None:
        """Compute each part again in the backward pass instead of keeping its activations.

        About a third more time for a fraction of the memory. To be said once, before compiling and sharding.

        Args:
            selective: Keep what products and attention gave: little is computed again, for less memory saved.
        """
        self.recomputes = not selective
        for part in self.parts():
            # Bound to the part, not closed over it: a deep copy then recomputes the copy.
            part.forward = partial(_recomputed, part.forward, part, selective)

    def check_blocks(self, blocks: Sequence[int]) -> list[int]:
        """Return block numbers from 0.

        Raises:
            ValueError: If a block does not exist.
        """
        wanted = [block if block >= 0 else self.depth + block for block in blocks]
        if any(not 0 <= block < self.depth for block in wanted):
            raise ValueError(f"blocks {list(blocks)} asked for; this model has blocks 0 to {self.depth - 1}")
        return wanted


class _FrozenStatistics:
    """Batch norms leave their running statistics alone while a part is computed a second time."""

    def __init__(self, part: nn.Module) -> None:
        self.norms = [module for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()

    def __exit__(self, *_error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# What takes longest to compute again. The reference leaves out addmm, which is every linear layer with a bias.
_aten = torch.ops.aten
KEPT_OPERATIONS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _kept_or_recomputed(_context: Any, operation: Any, *_arguments: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(forward: Any, part: nn.Module, selective: bool, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    again: dict[str, Any] = {}
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in part.modules()):
        again["context_fn"] = lambda: (_Nothing(), _FrozenStatistics(part))
    elif selective:
        again["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_or_recomputed)
    # Nothing random may happen inside a part that is not decided before: drop path's plan is an argument.
    if not torch.compiler.is_compiling():  # what is compiled has no such copies
        forward = partial(_without_weight_cache, forward)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=is_random(part), **again, **named)


def _without_weight_cache(forward: Any, *arguments: Any, **named: Any) -> Any:
    """Run a part whose weights' narrow copies are not kept: autocast would hold those of all parts until the step's end."""
    device = arguments[0].device.type
    if not torch.is_autocast_enabled(device):
        return forward(*arguments, **named)
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
        return forward(*arguments, **named)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_error: object) -> None: ...


def is_random(part: nn.Module) -> bool:
    """Tell whether a part draws from torch's own generator while it trains: dropout, timm's drop path."""
    return any(float(getattr(module, name, 0.0) or 0.0) > 0 for module in part.modules() for name in ("p", "drop_prob"))
