"""Any timm model as a backbone: vision transformers with and without a CLS token, and convolutional networks."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed
from meddino.layers.drop_path import DropPathPlan
from meddino.models.backbone import Backbone, BackboneOutput, LayerGroup, is_random

TIMM_PREFIX = "timm:"


class TimmConfig(StrictConfig):
    """The architecture of a timm model without its classifier."""

    timm: str
    """timm's name of it, such as resnet50."""
    arguments: dict[str, int | float | bool | str | tuple[int, ...] | None] = Field(default_factory=dict)
    """For timm.create_model, where they differ from the name's own; in_chans among them."""
    in_chans: int = Field(3, gt=0)
    """Channels of an image."""
    embed_dim: int = Field(gt=0)
    """Width of the patch tokens."""
    patch_size: int = Field(gt=0)
    """Pixels between patch tokens: the patch, or the stride of the last map."""
    timm_version: str
    """Of the timm that described it: another one may build another network under the same name."""


def timm_config(name: str, **arguments: Any) -> TimmConfig:
    """Return the architecture behind a timm name.

    Args:
        name: timm's, without the prefix `timm:`.
        arguments: For timm.create_model, e.g. drop_path_rate, img_size.

    Raises:
        ConfigError: timm does not know the name or an argument.
    """
    import timm

    with torch.device("meta"):
        model = build_timm(name, arguments)
    return TimmConfig(
        timm=name,
        arguments=arguments,
        in_chans=int(arguments.get("in_chans", 3)),
        embed_dim=int(model.num_features),  # type: ignore[arg-type]
        patch_size=_stride(model),
        timm_version=timm.__version__,
    )


def build_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a timm model without its classifier, with random weights; nothing is downloaded.

    Raises:
        ConfigError: timm does not know the name or an argument, or the model gives no maps.
    """
    import timm

    base = name.split(".", maxsplit=1)[0]
    if not timm.is_model(base):
        near = timm.list_models(f"*{base.split('_')[0]}*")[:6]
        raise ConfigError(f"timm has no model '{name}'; similar: {', '.join(near) or 'none'}")
    options = dict(arguments)
    if _module_of(base).endswith(".vision_transformer"):
        # The position embedding is resampled to whatever size comes in, as the published protocols do.
        options.setdefault("dynamic_img_size", True)
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ConfigError(f"timm's '{name}' cannot be built with {dict(arguments)}: {str(error).splitlines()[0]}") from error
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"timm's '{name}' gives no maps of its layers (forward_intermediates); choose another model")
    return model


class TimmBackbone(Backbone):
    """A timm model behind the protocol of backbones.

    The vector of an image is the CLS token after the last norm, or the mean over the last map where there is none (before
    what some networks do between pooling and classifier). Parameters that the tokens do not depend on are not trained.

    Args:
        config: From `timm_config`.

    Attributes:
        model: timm's own.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config: TimmConfig = config
        self.model = build_timm(config.timm, config.arguments)
        self.embed_dim, self.patch_size = config.embed_dim, config.patch_size
        embedding = getattr(self.model, "patch_embed", None)
        self.multiple_px = self.patch_size if embedding is not None else 1
        self.fixed_px: tuple[int, int] | None = getattr(embedding, "img_size", None)
        if not getattr(embedding, "strict_img_size", False) or getattr(embedding, "dynamic_img_pad", False):
            self.fixed_px = None
        signature = inspect.signature(self.model.forward_intermediates).parameters  # type: ignore[arg-type]
        self.has_prefix = "return_prefix_tokens" in signature
        self.has_cls = self.has_prefix and getattr(self.model, "cls_token", None) is not None
        blocks, info = getattr(self.model, "blocks", None), getattr(self.model, "feature_info", None)
        self.is_sequence = self.has_prefix or (blocks is not None and hasattr(self.model, "pos_embed"))
        self.depth = len(blocks) if self.is_sequence and blocks is not None else len(info) if info is not None else 1
        self._unused = frozenset(_unused(config))
        for name in self._unused:
            self.model.get_parameter(name).requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], *, plan: DropPathPlan | None = None
    ) -> BackboneOutput:
        """Return the tokens of images of one size; see `Backbone.tokens`.

        Raises:
            ValueError: The model does not take images of this size.
        """
        self._check_size(images)
        if plan is None or not self.training or not self._is_random:
            return self._output(images)
        # timm's drop path and dropout ask torch's own generator: seeded here, so that a resumed run drops the same.
        first = [group.indices[0] for group in plan.groups if group.indices]
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(plan.seed, "timm", plan.step, *first))
            return self._output(images)

    def get_intermediate_layers(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[Float[Tensor, "batch _dim _rows _columns"]]:
        """See `Backbone.get_intermediate_layers`: blocks of a transformer; stages of other networks, each at its own stride."""
        self._check_size(images)
        wanted = self.check_blocks(blocks)
        options = {"norm": norm} if self.has_prefix else {}
        maps: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=sorted(set(wanted)), output_fmt="NCHW", intermediates_only=True, **options
        )
        found = dict(zip(sorted(set(wanted)), maps, strict=True))
        return [found[block] for block in wanted]

    def intermediate_outputs(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[BackboneOutput]:
        """See `Backbone.intermediate_outputs`; without a CLS token the vector is the mean over the map."""
        if not self.has_prefix:
            wanted = self.check_blocks(blocks)
            final, maps = self.model.forward_intermediates(images, indices=sorted(set(wanted)), output_fmt="NCHW")  # type: ignore[operator]
            by_block = dict(zip(sorted(set(wanted)), maps, strict=True))
            if norm and self.depth - 1 in by_block:
                # What stands behind the last map (a norm, a neck) is what `tokens` gives.
                by_block[self.depth - 1] = final.permute(0, 3, 1, 2) if self._is_nhwc else final
            return [self._from_map(by_block[block], None) for block in wanted]
        self._check_size(images)
        wanted = self.check_blocks(blocks)
        pairs: list[tuple[Tensor, Tensor]] = self.model.forward_intermediates(  # type: ignore[operator]
            images,
            indices=sorted(set(wanted)),
            output_fmt="NCHW",
            intermediates_only=True,
            norm=norm,
            return_prefix_tokens=True,
        )
        found = dict(zip(sorted(set(wanted)), pairs, strict=True))
        return [self._from_map(*found[block]) for block in wanted]

    def layer_groups(self) -> list[LayerGroup]:
        """See `Backbone.layer_groups`: timm's own grouping of the model's parameters."""
        from timm.models import group_parameters

        matcher: Any = self.model.group_matcher
        layers: dict[str, int] = group_parameters(self.model, matcher(coarse=False), reverse=True)
        names: dict[int, list[str]] = {}
        for name in (name for name, _ in self.model.named_parameters() if name not in self._unused):
            names.setdefault(int(layers[name]), []).append(name)
        groups: list[LayerGroup] = []
        for place, number in enumerate(sorted(names)):
            distance, inside = len(names) - 1 - place, names[number]
            if place == 0:  # what stands beside the layer that reads pixels: CLS token, position embedding
                loose = [name for name in inside if "." not in name]
                inside = [name for name in inside if "." in name]
                groups += [LayerGroup("tokens", distance, _inside(loose))] if loose else []
            if place > 0 and (owner := self._largest_module(inside)):
                of_module = [name for name in inside if name.startswith(f"{owner}.")]
                inside = [name for name in inside if name not in of_module]
                groups.append(LayerGroup(owner, distance, _inside(of_module), self.model.get_submodule(owner)))
            if inside:
                groups.append(LayerGroup("stem" if place == 0 else inside[0], distance, _inside(inside), is_stem=place == 0))
        return groups

    def _largest_module(self, names: Sequence[str]) -> str | None:
        """Return the module with layers of its own that holds most of these parameters and no others."""
        owners = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
        sizes: dict[str, int] = {}
        for owner in sorted(owners):
            module = self.model.get_submodule(owner)
            inside = {f"{owner}.{name}" for name, _ in module.named_parameters()} - self._unused
            # A list of modules is not called as a whole.
            if not isinstance(module, nn.ModuleList) and any(True for _ in module.children()) and inside <= set(names):
                sizes[owner] = len(inside)
        return max(sizes, key=lambda owner: (sizes[owner], owner.count("."))) if sizes else None

    @functools.cached_property
    def _is_random(self) -> bool:
        return is_random(self)

    @property
    def _is_nhwc(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def _check_size(self, images: Tensor) -> None:
        size = (images.shape[-2], images.shape[-1])
        channels = self.config.in_chans
        if images.shape[1] != channels or any(side < 1 or side % self.multiple_px for side in size):
            raise ValueError(
                f"images are [B, C, H, W] = {list(images.shape)}; timm's {self.config.timm} needs C = {channels} and H, W "
                f"multiples of {self.multiple_px}"
            )
        if self.fixed_px is not None and size != tuple(self.fixed_px):
            raise ValueError(
                f"images are {list(size)} px; timm's {self.config.timm} is built for {list(self.fixed_px)} px: give it "
                "img_size among its arguments"
            )

    def _output(self, images: Tensor) -> BackboneOutput:
        if self.has_prefix:
            ((patches, prefix),) = self.model.forward_intermediates(  # type: ignore[operator]
                images, indices=1, return_prefix_tokens=True, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        else:
            patches, prefix = self.model.forward_features(images), None  # type: ignore[operator]
            patches = patches.permute(0, 3, 1, 2) if self._is_nhwc else patches
        return self._from_map(patches, prefix)

    def _from_map(self, patches: Tensor, prefix: Tensor | None) -> BackboneOutput:
        tokens = patches.flatten(2).transpose(1, 2)
        cls_token = prefix[:, 0] if self.has_cls and prefix is not None else patches.mean((2, 3))
        registers = prefix[:, 1 if self.has_cls else 0 :] if prefix is not None else tokens[:, :0]
        return BackboneOutput(cls_token, registers, tokens, (patches.shape[-2], patches.shape[-1]))


def _inside(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"model.{name}" for name in names)


def _module_of(base: str) -> str:
    import timm

    module = inspect.getmodule(timm.model_entrypoint(base))
    return module.__name__ if module is not None else ""


def _stride(model: nn.Module) -> int:
    embedding, info = getattr(model, "patch_embed", None), getattr(model, "feature_info", None)
    if getattr(model, "blocks", None) is not None and embedding is not None:
        return int(embedding.patch_size[0])
    assert info is not None  # whatever gives maps also describes them
    return int(info[-1]["reduction"])


@functools.cache
def _unused_of(description: str) -> tuple[str, ...]:
    config = TimmConfig.model_validate_json(description)
    with torch.device("meta"):
        model = build_timm(config.timm, config.arguments)
        size: tuple[int, ...] = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        given = config.arguments.get("img_size") or size[-1]
        side = given[-1] if isinstance(given, tuple) else int(given)
        images = torch.empty(2, config.in_chans, side, side)
    trained = dict(model.named_parameters())
    has_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters  # type: ignore[arg-type]
    if has_prefix:
        (tokens,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)  # type: ignore[operator]
    else:
        tokens = model.forward_features(images)  # type: ignore[operator]
    found = torch.autograd.grad(tokens.sum(), list(trained.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(trained, found, strict=True) if gradient is None)


def _unused(config: TimmConfig) -> tuple[str, ...]:
    """Return the parameters that the tokens do not depend on (norms of a pooling that is not done here, for example)."""
    return _unused_of(config.model_dump_json())
