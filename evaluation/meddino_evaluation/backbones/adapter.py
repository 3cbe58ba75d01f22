"""What every backbone looks like to the protocols, and our own vision transformer in that shape."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.checkpoints.export.model import Model
from meddino.models.registry import tapped_blocks
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.backbones.contract import ImageContract


@dataclass(frozen=True)
class Tokens:
    """What a backbone says about a batch of images.

    Attributes:
        blocks: CLS-like vectors [B, D_i] of the last blocks or stages, the last one last. A model without a CLS token
            gives the mean over positions.
        patches: Patch tokens of the last block as a map [B, D, h, w].
    """

    blocks: tuple[Float[Tensor, "batch _dim"], ...]
    patches: Float[Tensor, "batch dim rows columns"]

    @property
    def cls(self) -> Float[Tensor, "batch dim"]:
        """The vector that stands for the image."""
        return self.blocks[-1]


class Backbone(nn.Module, ABC):
    """A backbone behind one face.

    Attributes:
        name: For tables: as the user asked for it, or the NAME of NAME=MODEL.
        spec: Where it came from, as the user asked for it.
        embed_dim: Width of the last CLS-like vector and of the patch tokens.
        patch_size: Pixels between patch tokens.
        contract: How images become input.
        lineage: What an export says of its training data; empty for weights that say nothing.
    """

    name: str
    spec: str = ""
    embed_dim: int
    patch_size: int
    contract: ImageContract
    lineage: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """Return the tokens of a batch.

        Args:
            images: From the contract.
            count: CLS-like vectors of so many last blocks; a model with fewer stages gives fewer.
        """

    @abstractmethod
    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """Return `count` maps [B, D_i, h_i, w_i] from evenly spread blocks, the last one last (fewer if there are fewer)."""

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """Return the blocks or stages from input to output: what partial freezing counts."""

    def forward(self, images: Float[Tensor, "batch channels h w"]) -> Tensor:
        """Return the CLS-like vectors [B, D]."""
        return self.tokens(images).cls

    def hash(self) -> str:
        """Return a SHA-256 over names, shapes and values of all parameters and buffers."""
        return state_hash(self)


def state_hash(module: nn.Module) -> str:
    """Return a SHA-256 over names, shapes and values of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(values.shape)}{values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    # Buffers that are not saved (statistics that somebody keeps aside) must not drift either.
    saved = set(module.state_dict())
    for name, buffer in sorted(module.named_buffers()):
        if name not in saved:
            digest.update(name.encode())
            digest.update(buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class MedDINOBackbone(Backbone):
    """Our vision transformer: an export, or random weights."""

    def __init__(self, name: str, model: Model) -> None:
        super().__init__()
        self.name = name
        if not isinstance(model.backbone, VisionTransformer):
            raise TypeError(f"{name} is no vision transformer of ours but {type(model.backbone).__name__}")
        self.vit = model.backbone
        self.lineage = model.lineage.model_dump(mode="json")
        self.embed_dim, self.patch_size = model.embed_dim, model.patch_size
        sizes = model.config.resolutions_px_seen
        native = max(sizes) if sizes else 14 * model.patch_size
        self.contract = ImageContract((), (), model.patch_size, native, model.contract)

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """See `Backbone.tokens`: the CLS token after each of the last blocks, through the last LayerNorm."""
        taken: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
            taken.append(output.reshape(len(images), -1, self.embed_dim)[:, 0])

        last = list(self.vit.blocks)[-count:]
        hooks = [block.register_forward_hook(keep) for block in last[:-1]]
        try:
            output = self.vit(images)
        finally:
            for hook in hooks:
                hook.remove()
        norm = self.vit.cls_norm if self.vit.cls_norm is not None else self.vit.norm
        patches = output.patch_tokens.transpose(1, 2).unflatten(2, output.grid)
        return Tokens((*(norm(cls) for cls in taken), output.cls_token), patches)

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """See `Backbone.patch_maps`."""
        maps: list[Tensor] = self.vit.get_intermediate_layers(images, tapped_blocks(self.vit.depth, min(count, self.vit.depth)))
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """See `Backbone.stages`."""
        return list(self.vit.blocks)
