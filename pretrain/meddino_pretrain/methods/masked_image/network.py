"""A backbone that sees some patches and a decoder that paints the others; `forward` is the whole computation of a step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meddino.core.device import at_least_float32
from meddino.layers.attention import SelfAttention
from meddino.layers.cpu.lean_branches import LeanBlock
from meddino.layers.drop_path import DropPathPlan
from meddino.layers.feed_forward import Mlp
from meddino.layers.linear import Linear
from meddino.layers.packing import CropGroup
from meddino.layers.rotary_embedding import RotaryEmbedding
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.masked_image.config import DecoderConfig, MaskedImageConfig

CROPS, VISIBLE, MASKED = "crops", "visible", "masked"


class Decoder(nn.Module):
    """Puts a mask token where no patch was seen, and paints all patches.

    Source: He et al. 2022. Difference: places are told by rotary embedding, as in the backbone, not by a sine added to tokens;
    so crops may have any size.
    """

    def __init__(self, in_dim: int, pixels: int, config: DecoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.embed = Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.rope = RotaryEmbedding(dim // config.heads, 100.0, "separate", None, None, None, torch.float32)
        self.blocks = nn.ModuleList(
            LeanBlock(dim, SelfAttention(dim, config.heads, True, False), Mlp(dim, 4 * dim), None, 1e-6)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.paint = Linear(dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        cls_token: Float[Tensor, "b d"],
        patch_tokens: Float[Tensor, "b k d"],
        visible: Int[Tensor, "b k"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "b n pixels"]:
        """Return every patch's pixels, those of the visible ones too."""
        seen = self.embed(torch.cat([cls_token[:, None], patch_tokens], dim=1))
        batch, patches = len(seen), grid[0] * grid[1]
        tokens = self.mask_token.to(seen.dtype).expand(batch, patches, -1)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, seen.shape[-1]), seen[:, 1:])
        x = torch.cat([seen[:, :1], tokens], dim=1).flatten(0, 1)
        groups = (CropGroup(batch, patches + 1, self.rope(*grid, 1)),)
        for block in self.blocks:
            x = block(x, groups, None)
        painted: Tensor = self.paint(self.norm(x).unflatten(0, (batch, -1))[:, 1:])
        return painted


class MaskedImageNetwork(nn.Module):
    """See the module."""

    def __init__(self, backbone: VisionTransformer, config: MaskedImageConfig) -> None:
        super().__init__()
        self.normalised_targets = config.normalised_targets
        self.backbone = backbone
        pixels = backbone.patch_size**2 * backbone.config.in_chans
        self.decoder = Decoder(backbone.embed_dim, pixels, config.decoder)

    def forward(self, batch: Batch, plan: DropPathPlan) -> dict[str, Float[Tensor, ""]]:
        """Return the mean squared error of the patches that were not seen."""
        images = batch.views[CROPS]
        painted = self.painted(images, batch.extras[VISIBLE], plan)
        with torch.autocast(images.device.type, enabled=False):
            wanted = patch_pixels(images.to(painted.dtype), self.backbone.patch_size)
            loss = reconstruction_loss(painted, wanted, batch.extras[MASKED], self.normalised_targets)
        return {"reconstruction": loss.detach(), "total": loss}

    def painted(
        self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b k"], plan: DropPathPlan | None
    ) -> Float[Tensor, "b n pixels"]:
        """Return what the decoder makes of the visible patches."""
        seen = self.backbone(images, visible=visible, plan=plan)
        return at_least_float32(self.decoder(seen.cls_token, seen.patch_tokens, visible, seen.grid))


def patch_pixels(images: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b n pixels"]:
    """Return the pixels of each patch, patches row by row, pixels by row, column and channel."""
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def reconstruction_loss(
    painted: Float[Tensor, "b n pixels"],
    wanted: Float[Tensor, "b n pixels"],
    masked: Int[Tensor, "b m"],
    normalised: bool,
) -> Float[Tensor, ""]:
    """Return the mean squared error over the masked patches.

        for each image and masked patch: mean((painted - target) ** 2), target = (wanted - mean) / sqrt(variance + 1e-6)

    Args:
        painted: By the decoder.
        wanted: The patches' pixels.
        masked: Patches that count.
        normalised: Whether targets are brought to mean 0 and deviation 1, patch by patch; else they are the pixels.

    Source: He et al. 2022; the variance is the unbiased one, as in their code.
    """
    if normalised:
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (painted - wanted).square().mean(-1)
    return errors.gather(1, masked).mean()
