"""The DINOv3 vision transformer under its official parameter names, with a packed forward over crops of several sizes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from meddino.core.compilation import outside_of_graphs
from meddino.core.config import StrictConfig
from meddino.layers.attention import SelfAttention
from meddino.layers.block import LayerScale, OutputNorm, TransformerBlock
from meddino.layers.cpu.lean_branches import LeanBlock
from meddino.layers.drop_path import DropPathPlan
from meddino.layers.feed_forward import build_feed_forward
from meddino.layers.linear import KeyMaskedLinear
from meddino.layers.packing import CropGroup, KeptTokens, join_groups, kept_tokens, split_groups
from meddino.layers.patch_embedding import PatchEmbedding
from meddino.layers.rotary_embedding import RotaryEmbedding
from meddino.models.backbone import Backbone, BackboneOutput, LayerGroup

# Where a block is computed again for all its crops: a CPU's own branches hold little.
ALL_GROUPS_AT_ONCE = ("cpu",)
ROPE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ViTConfig(StrictConfig):
    """The architecture of a vision transformer. Defaults are those of DINOv3's trainer unless said otherwise."""

    embed_dim: int = Field(gt=0)
    """Width of the tokens."""
    depth: int = Field(gt=0)
    """Number of blocks."""
    num_heads: int = Field(gt=0)
    """Attention heads; embed_dim / num_heads must be a multiple of 4."""
    patch_size: int = Field(16, gt=0)
    """Side of a patch, pixels."""
    in_chans: int = Field(3, gt=0)
    """Channels of an image; official weights have 3."""
    ffn_ratio: float = Field(4.0, gt=0)
    """Hidden width of the perceptron over embed_dim (before SwiGLU's two thirds)."""
    ffn_layer: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = "mlp"
    """Kind of the perceptron; the number is what SwiGLU's width is rounded up to."""
    num_registers: int = Field(4, ge=0)
    """Register tokens (official: n_storage_tokens); 4 in every released DINOv3 model."""
    qkv_bias: bool = True
    """Bias of queries, keys, values; false in the 7B model and in MedDINOv3's weights."""
    mask_k_bias: bool = True
    """Hold the keys' bias at zero; no effect without qkv_bias."""
    layerscale_init: float | None = 1e-5
    """Initial LayerScale; null for none."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of LayerNorm: 1e-6 in DINOv3's trainer, 1e-5 in the released (hub) models."""
    rope_base: float = Field(100.0, gt=0)
    """Longest period of the rotary embedding over its shortest."""
    rope_normalise: Literal["separate", "max", "min"] = "separate"
    """How patch coordinates are brought to [-1, 1]: each axis, or by the longer or shorter side."""
    rope_shift: float | None = Field(None, gt=0)
    """Training only: largest shift of the coordinates; null in the released recipe."""
    rope_jitter: float | None = Field(None, ge=1)
    """Training only: largest factor on each axis; null in the released recipe."""
    rope_rescale: float | None = Field(None, ge=1)
    """Training only: largest factor on both axes; 2 in DINOv3."""
    rope_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the rotary embedding: fp32 in the hub models, bf16 in DINOv3's trainer."""
    untie_cls_and_patch_norms: bool = False
    """A last LayerNorm of their own for CLS and registers."""
    untie_global_and_local_cls_norm: bool = False
    """Another one for CLS and registers of local crops in training; true in the 7B model."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Training only: share of samples that each residual branch leaves out, the same in every block."""

    @model_validator(mode="after")
    def _check_heads(self) -> "ViTConfig":
        if self.embed_dim % self.num_heads or self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} over num_heads {self.num_heads} must be a whole multiple of 4 (rotary embedding)"
            )
        return self


class VisionTransformer(Backbone):
    """DINOv3's backbone: CLS and register tokens, rotary embedding, LayerScale, pre-norm blocks.

    Args:
        config: The architecture.

    Source: Siméoni et al. 2025 (DINOv3); the state dict has the official names and loads strictly.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config: ViTConfig = config
        self.embed_dim, self.patch_size, self.depth = config.embed_dim, config.patch_size, config.depth
        self.multiple_px = config.patch_size
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.num_registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, config.num_registers, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbedding(config.patch_size, config.in_chans, dim)
        self.rope_embed = RotaryEmbedding(
            dim // config.num_heads,
            config.rope_base,
            config.rope_normalise,
            config.rope_shift,
            config.rope_jitter,
            config.rope_rescale,
            ROPE_DTYPES[config.rope_dtype],
        )
        self.blocks = nn.ModuleList(_build_block(config) for _ in range(config.depth))
        self.norm = OutputNorm(dim, eps=config.norm_eps)
        self.cls_norm = OutputNorm(dim, eps=config.norm_eps) if config.untie_cls_and_patch_norms else None
        self.local_cls_norm = OutputNorm(dim, eps=config.norm_eps) if config.untie_global_and_local_cls_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: normal of 0.02 for tokens, the same cut at 2 for linear layers, zero biases and mask token."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.config.num_registers:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | LayerScale | PatchEmbedding):
                module.reset_parameters()
            if isinstance(module, KeyMaskedLinear):
                module.reset_mask()
            elif isinstance(module, RotaryEmbedding):
                module.reset_periods()

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return 1 + self.config.num_registers

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        masks: Bool[Tensor, "batch patches"] | None = None,
        *,
        visible: Int[Tensor, "batch kept"] | None = None,
        rng: torch.Generator | None = None,
        plan: DropPathPlan | None = None,
    ) -> BackboneOutput:
        """Return the normalised tokens of images of one size.

        Args:
            images: Normalised by the model's input contract; sides are multiples of the patch size.
            masks: True where a patch is replaced by the mask token.
            visible: The patches of each image that are computed, all others are left away; `patch_tokens` are these, in this
                order. Not with drop path.
            rng: In training, what drop path and coordinate augmentation draw from; see `forward_crops`.
            plan: See `forward_crops`.
        """
        return self.forward_crops([images], [masks], visible=visible, rng=rng, plan=plan)[0]

    def forward_crops(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        visible: Int[Tensor, "batch kept"] | None = None,
        rng: torch.Generator | None = None,
        plan: DropPathPlan | None = None,
    ) -> list[BackboneOutput]:
        """Return the normalised tokens of several groups of crops; linear layers run once over all tokens.

        Args:
            crops: Groups of images [B_i, C, H_i, W_i]. The first holds the global crops; the CLS of later ones goes
                through `local_cls_norm` in training where the model has one.
            masks: For each group, [B_i, N_i] bool or None.
            visible: Of a single group; see `forward`.
            rng: Generator on the CPU for a batch that stands alone; torch's default one if None.
            plan: The random choices as a function of the samples' numbers in the global batch; takes precedence over
                `rng`. In evaluation mode neither is used.

        Raises:
            ValueError: If an image's sides are no multiples of the patch size or a mask's shape differs from the grid.
        """
        if masks is None:
            masks = [None] * len(crops)
        if self.training and plan is None and (self.config.drop_path > 0 or self.rope_embed.augments):
            plan = DropPathPlan.from_generator(rng, [len(images) for images in crops])
        x, groups = self._embed(crops, masks, plan if self.training else None, visible)
        for block, kept in zip(self.blocks, self._kept(plan, groups, x), strict=True):
            x = block(x, groups, kept)
        grids = [self._grid(images) for images in crops]
        return self._normalised(x, groups, grids)

    def get_intermediate_layers(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """See `Backbone.get_intermediate_layers`."""
        rows, columns = self._grid(images)
        maps = []
        for tokens in self._after_blocks(images, blocks):
            patches = tokens[:, self.prefix_tokens :]
            patches = self.norm(patches) if norm else patches
            maps.append(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        return maps

    def intermediate_outputs(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[BackboneOutput]:
        """See `Backbone.intermediate_outputs`."""
        outputs = []
        for tokens in self._after_blocks(images, blocks):
            first, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
            if norm:
                first, patches = (self.cls_norm or self.norm)(first), self.norm(patches)
            outputs.append(BackboneOutput(first[:, 0], first[:, 1:], patches, self._grid(images)))
        return outputs

    def _after_blocks(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the tokens [B, prefix + N, D] after each of some blocks, not normalised."""
        wanted = self.check_blocks(blocks)
        plan = None
        if self.training and (self.config.drop_path > 0 or self.rope_embed.augments):
            plan = DropPathPlan.from_generator(None, [len(images)])
        x, groups = self._embed([images], [None], plan)
        kept = self._kept(plan, groups, x)
        taken: dict[int, Tensor] = {}
        for index in range(max(wanted) + 1):
            x = self.blocks[index](x, groups, kept[index])
            if index in wanted:
                taken[index] = split_groups(x, groups)[0]
        return [taken[block] for block in wanted]

    def layer_groups(self) -> list[LayerGroup]:
        """See `Backbone.layer_groups`: tokens and patch embedding, the blocks, the last norms."""
        names: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            first, _, rest = name.partition(".")
            owner = f"blocks.{rest.partition('.')[0]}" if first == "blocks" else "tokens" if not rest else first
            names.setdefault(owner, []).append(name)
        distances = {"tokens": self.depth + 1, "patch_embed": self.depth + 1}
        distances |= {f"blocks.{number}": self.depth - number for number in range(self.depth)}
        modules = {f"blocks.{number}": block for number, block in enumerate(self.blocks)}
        return [
            LayerGroup(owner, distances.get(owner, 0), tuple(inside), modules.get(owner), owner == "patch_embed")
            for owner, inside in names.items()
        ]

    def recompute_activations(self, selective: bool = False) -> None:
        """See `Backbone.recompute_activations`; a block computed again takes one group of crops at a time, but on a CPU."""
        super().recompute_activations(selective)
        for block in () if selective else self.blocks:
            block.forward = partial(_group_by_group, block.forward)  # see `compile_modules`

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _embed(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        plan: DropPathPlan | None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, tuple[CropGroup, ...]]:
        parts, groups = [], []
        for number, (images, mask) in enumerate(zip(crops, masks, strict=True)):
            patches: Tensor = self.patch_embed(images)
            if mask is not None:
                if mask.shape != patches.shape[:2]:
                    raise ValueError(f"mask of group {number} is {list(mask.shape)}; its patches are {list(patches.shape[:2])}")
                patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
            if visible is not None:
                patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
            batch = images.shape[0]  # not len(): torch.export would take the number for a constant
            prefix = [self.cls_token.expand(batch, -1, -1)]
            if self.config.num_registers:
                prefix.append(self.storage_tokens.expand(batch, -1, -1))
            tokens = torch.cat([*(token.to(patches.dtype) for token in prefix), patches], dim=1)
            table = self.rope_embed(*self._grid(images), self.prefix_tokens, plan.rope_rng(number) if plan else None)
            table = table if visible is None else table.of_patches(visible, self.prefix_tokens)
            parts.append(tokens)
            groups.append(CropGroup(batch, tokens.shape[1], table))
        return join_groups(parts), tuple(groups)

    def _kept(
        self, plan: DropPathPlan | None, groups: Sequence[CropGroup], x: Tensor
    ) -> Sequence[tuple[KeptTokens, KeptTokens] | None]:
        """Return what drop path keeps in each block's two branches; None where it keeps all."""
        if not self.training or plan is None or self.config.drop_path == 0:
            return [None] * self.depth
        kept = kept_tokens(plan.kept_samples(self.depth, self.config.drop_path, x.device), groups, x)
        return list(zip(kept[::2], kept[1::2], strict=True))

    def _normalised(self, x: Tensor, groups: Sequence[CropGroup], grids: Sequence[tuple[int, int]]) -> list[BackboneOutput]:
        prefix = self.prefix_tokens
        outputs = []
        for number, (tokens, grid) in enumerate(zip(split_groups(self.norm(x), groups), grids, strict=True)):
            first = tokens[:, :prefix]
            own_norm = self.cls_norm
            if self.training and number > 0 and self.local_cls_norm is not None:
                own_norm = self.local_cls_norm
            if own_norm is not None:
                first = own_norm(split_groups(x, groups)[number][:, :prefix])
            outputs.append(BackboneOutput(first[:, 0], first[:, 1:], tokens[:, prefix:], grid))
        return outputs


@outside_of_graphs
def _group_by_group(
    forward: Callable[..., Tensor],
    x: Tensor,
    groups: Sequence[CropGroup],
    kept: tuple[KeptTokens, KeptTokens] | None = None,
) -> Tensor:
    """Run a block for one group of crops after the other, so that its backward pass holds what a single one takes."""
    if len(groups) == 1 or x.device.type in ALL_GROUPS_AT_ONCE:
        return forward(x, groups, kept)
    parts = torch.split(x, [group.batch * group.tokens for group in groups])
    branches = [each.by_group(groups) for each in kept] if kept else []
    owns = list(zip(*branches, strict=True)) if kept else [None] * len(groups)
    return torch.cat([forward(part, (group,), own) for part, group, own in zip(parts, groups, owns, strict=True)])


def _build_block(config: ViTConfig) -> TransformerBlock:
    attention = SelfAttention(config.embed_dim, config.num_heads, config.qkv_bias, config.mask_k_bias)
    feed_forward = build_feed_forward(config.ffn_layer, config.embed_dim, config.ffn_ratio)
    return LeanBlock(config.embed_dim, attention, feed_forward, config.layerscale_init, config.norm_eps)
