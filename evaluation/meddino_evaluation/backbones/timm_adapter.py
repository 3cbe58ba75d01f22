"""Backbones built by timm: vision transformers with and without a CLS token, and convolutional networks."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meddino.data.intensity import Intensity
from meddino.models.registry import tapped_blocks
from meddino_evaluation.backbones.adapter import Backbone, Tokens
from meddino_evaluation.backbones.contract import ImageContract


class TimmBackbone(Backbone):
    """A timm model behind the common face."""

    def __init__(self, name: str, model: nn.Module, own: Intensity | None = None) -> None:
        """Take a model of timm; with `own` it is a model of ours with that input contract."""
        super().__init__()
        self.name = name
        self.model = model
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        embedding = getattr(model, "patch_embed", None)
        forward: Any = model.forward_intermediates
        self._has_prefix = "return_prefix_tokens" in inspect.signature(forward).parameters
        self._has_cls = self._has_prefix and getattr(model, "cls_token", None) is not None
        stride = embedding.patch_size[0] if embedding is not None else int(model.feature_info[-1]["reduction"])  # type: ignore[index]
        self.patch_size = int(stride)
        self.embed_dim = int(model.num_features)  # type: ignore[arg-type]
        native = int(config.get("input_size", (3, 224, 224))[-1])
        self.contract = ImageContract(
            tuple(config.get("mean", ImageContract.mean)),
            tuple(config.get("std", ImageContract.std)),
            self.patch_size if embedding is not None else 1,
            native,
            own,
        )

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """See `Backbone.tokens`. Without a CLS token the mean over positions stands for it."""
        if self._has_prefix:
            _, parts = self.model.forward_intermediates(  # type: ignore[operator]
                images, indices=min(count, len(self.stages())), return_prefix_tokens=True, norm=True, output_fmt="NCHW"
            )
            vectors = [prefix[:, 0] if self._has_cls else patches.mean((2, 3)) for patches, prefix in parts]
            return Tokens(tuple(vectors), parts[-1][0])
        final, maps = self.model.forward_intermediates(images, indices=min(count, self._taps()))  # type: ignore[operator]
        # The last map is what the classifier reads (after a neck or a last norm), not the raw last stage.
        return Tokens((*(one.mean((2, 3)) for one in maps[:-1]), final.mean((2, 3))), final)

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """See `Backbone.patch_maps`. A convolutional network gives its last stages, at their own strides."""
        if not self._has_prefix and not hasattr(self.model, "blocks"):
            count = min(count, self._taps())
            _, maps = self.model.forward_intermediates(images, indices=count)  # type: ignore[operator]
            return list(maps)
        depth = len(self.stages())
        blocks = list(tapped_blocks(depth, min(count, depth)))
        options = {"norm": True} if self._has_prefix else {}
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=blocks, output_fmt="NCHW", intermediates_only=True, **options
        )
        return list(maps)

    def stages(self) -> Sequence[nn.Module]:
        """See `Backbone.stages`: the blocks of a transformer, the children of a convolutional network."""
        for name in ("blocks", "layers", "stages"):
            blocks = getattr(self.model, name, None)
            if isinstance(blocks, nn.Sequential | nn.ModuleList):
                return list(blocks)
        body = getattr(self.model, "features", None)
        children = list(body.children()) if isinstance(body, nn.Module) else list(self.model.children())
        return [child for child in children if any(True for _ in child.parameters())]

    def _taps(self) -> int:
        info = getattr(self.model, "feature_info", None)
        blocks = getattr(self.model, "blocks", None)
        return len(blocks) if blocks is not None else len(info) if info is not None else 1
