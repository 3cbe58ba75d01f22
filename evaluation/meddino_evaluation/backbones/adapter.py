"""What every backbone looks like to the protocols: a network of `meddino.models`, its name, its input contract, its origin."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.checkpoints.export.model import Model
from meddino.models.backbone import Backbone as Network
from meddino.models.registry import tapped_blocks
from meddino.models.timm_backbone import TimmBackbone
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.backbones.contract import ImageContract

NOTHING: Mapping[str, Any] = MappingProxyType({})


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


class Backbone(nn.Module):
    """A network and what an evaluation must know of it.

    Args:
        name: For tables: as the user asked for it, or the NAME of NAME=MODEL.
        network: Ours, timm's or transformers'.
        contract: How images become input.
        lineage: What an export says of its training data; empty for weights that say nothing.

    Attributes:
        spec: Where it came from, as the user asked for it.
        embed_dim: Width of the last CLS-like vector and of the patch tokens.
        patch_size: Pixels between patch tokens.
    """

    def __init__(self, name: str, network: Network, contract: ImageContract, lineage: Mapping[str, Any] = NOTHING) -> None:
        super().__init__()
        self.name, self.spec, self.network, self.contract, self.lineage = name, "", network, contract, dict(lineage)
        self.embed_dim, self.patch_size = network.embed_dim, network.patch_size

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """Return the tokens of a batch.

        Args:
            images: From the contract.
            count: CLS-like vectors of so many last blocks; a model with fewer stages gives fewer.
        """
        depth = self.network.depth
        last = range(depth - min(count, depth), depth)
        outputs = [self.network.tokens(images)] if count == 1 else self.network.intermediate_outputs(images, last)
        return Tokens(tuple(output.cls_token for output in outputs), outputs[-1].patch_map)

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """Return `count` maps [B, D_i, h_i, w_i], the last one last (fewer if there are fewer).

        Of evenly spread blocks; a convolutional network gives its last stages, at their own strides.
        """
        depth = self.network.depth
        count = min(count, depth)
        maps: list[Tensor] = self.network.get_intermediate_layers(
            images, tapped_blocks(depth, count) if self.network.is_sequence else range(depth - count, depth)
        )
        return maps

    def stages(self) -> Sequence[nn.Module]:
        """Return the blocks or stages from input to output: what partial freezing counts."""
        for owner in (self.network, getattr(self.network, "model", None)):
            for name in ("blocks", "layers", "stages"):
                blocks = getattr(owner, name, None)
                if isinstance(blocks, nn.Sequential | nn.ModuleList):
                    return list(blocks)
        model: nn.Module = getattr(self.network, "model", self.network)
        body = getattr(model, "features", None)
        children = list(body.children()) if isinstance(body, nn.Module) else list(model.children())
        return [child for child in children if any(True for _ in child.parameters())]

    def forward(self, images: Float[Tensor, "batch channels h w"]) -> Tensor:
        """Return the CLS-like vectors [B, D]."""
        return self.tokens(images).cls

    def hash(self) -> str:
        """Return a SHA-256 over names, shapes and values of all parameters and buffers."""
        return state_hash(self.network, "vit." if isinstance(self.network, VisionTransformer) else "")


def state_hash(module: nn.Module, prefix: str = "") -> str:
    """Return a SHA-256 over names, shapes and values of all parameters and buffers of a module.

    Args:
        module: Whose.
        prefix: Before each name: hashes that stand in results of earlier versions have it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{prefix}{name}{list(values.shape)}{values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    # Buffers that are not saved (statistics that somebody keeps aside) must not drift either.
    saved = set(module.state_dict())
    for name, buffer in sorted(module.named_buffers()):
        if name not in saved:
            digest.update(f"{prefix}{name}".encode())
            digest.update(buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_model(name: str, model: Model) -> Backbone:
    """Return a model of ours, whichever kind of network was trained, with the input contract it brings."""
    network, lineage = model.backbone, model.lineage.model_dump(mode="json")
    if isinstance(network, TimmBackbone):
        return Backbone(name, network, timm_contract(network, model), lineage)
    sizes = model.config.resolutions_px_seen
    native = max(sizes) if sizes else 14 * model.patch_size
    return Backbone(name, network, ImageContract((), (), model.patch_size, native, model.contract), lineage)


def timm_contract(network: TimmBackbone, model: Model | None = None) -> ImageContract:
    """Return how images become input of a timm model: as timm describes it, or by the contract of the model it is part of."""
    config: Mapping[str, Any] = getattr(network.model, "pretrained_cfg", {})
    return ImageContract(
        tuple(config.get("mean", ImageContract.mean)),
        tuple(config.get("std", ImageContract.std)),
        network.multiple_px,
        int(config.get("input_size", (3, 224, 224))[-1]),
        model.contract if model is not None else None,
    )
