"""A frozen backbone, a neck of two convolutions, and SAM's prompt encoder and mask decoder (transformers')."""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meddino.checkpoints.weights.weight_files import read_weights_file
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.seeds import derive_seed
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.prompts.config import DecoderConfig
from meddino_evaluation.prompts.drawing import Prompt

WIDTH = 256
"""Channels between image encoder and mask decoder; SAM's."""
_LAYERS = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}
_TO_TRANSFORMERS = (
    (r"^module\.", ""),
    (r"output_hypernetworks_mlps\.(\d+)\.layers\.(\d)", lambda m: f"output_hypernetworks_mlps.{m[1]}.{_LAYERS[m[2]]}"),
    (r"iou_prediction_head\.layers\.(\d)", lambda m: f"iou_prediction_head.{_LAYERS[m[1]]}"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"point_embeddings", "point_embed"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"\.norm(\d|_final_attn)", r".layer_norm\1"),
)
"""Names of SAM's own files to those of transformers, in this order."""


class Neck(nn.Module):
    """Two convolutions from a backbone's tokens to what the mask decoder reads: 1x1, norm, 3x3, norm.

    Args:
        channels: Of the tokens.

    Source: SAM's image encoder (arXiv 2304.02643), LVM-Med's ViT (768 to 256).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTH, kernel_size=1, bias=False)
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, maps: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch width rows cols"]:
        """Return the image embedding."""
        x = self.norm1(self.conv1(maps).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        embedding: Tensor = self.norm2(self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return embedding


class PromptNetwork(nn.Module):
    """From model input and prompts to one logit map a prompt; what learns is the neck and the mask decoder.

    Args:
        backbone: Held. One that ends in 256 channels (SAM's own) brings its neck.
        contract: How intensities become its input.
        size_px: Side of the square input.
        config: Of the decoder.
        seed: Of the weights that come from no file.

    Raises:
        ConfigError: transformers is not installed, or the model cannot take such a picture.
        CheckpointError: The decoder's file does not fit.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, contract: ImageContract, size_px: int, config: DecoderConfig, seed: int) -> None:
        super().__init__()
        check_model(backbone, size_px)
        self.backbone, self.contract, self.size_px = backbone, contract, size_px
        self.grid = size_px // backbone.patch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "prompt decoder"))
            width = token_width(backbone, contract.channels)
            self.neck = nn.Identity() if width == WIDTH else Neck(width)
            self.prompt_encoder, self.mask_decoder = _sam_parts(size_px, backbone.patch_size, config)
        if config.weights is not None:
            load_sam(self, Path(config.weights))
        self.prompt_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "PromptNetwork":
        """Switch to training. What is held stays in evaluation mode, batch norms of the image encoder among them."""
        super().train(mode)
        self.backbone.eval()
        self.prompt_encoder.eval()
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What learns, by name."""
        neck: dict[str, nn.Module] = {"neck": self.neck} if isinstance(self.neck, Neck) else {}
        return {**neck, "mask_decoder": self.mask_decoder}

    def own_state(self) -> dict[str, Tensor]:
        """Return all tensors but the image encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    def maps(self, images: Float[Tensor, "batch channels size size"]) -> list[Tensor]:
        """Return what the held image encoder makes of pictures: one map, in a list as other networks return several."""
        with torch.no_grad():
            return [self.backbone.tokens(images).patches]

    def forward(
        self, maps: Float[Tensor, "batch channels rows cols"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "batch size size"]:
        """Return logits of one prompt for each map, at the size of the input."""
        device = maps.device
        boxes, points, inside = None, None, None
        if prompts[0].box is not None:
            boxes = torch.tensor([[one.box] for one in prompts], dtype=torch.float32, device=device)
        if prompts[0].points:
            points = torch.tensor([[one.points] for one in prompts], dtype=torch.float32, device=device)
            inside = torch.ones(points.shape[:3], dtype=torch.int64, device=device)
        with torch.no_grad():
            sparse, dense = self.prompt_encoder(points, inside, boxes, None)
            place = self._places().to(device).expand(len(maps), -1, -1, -1)
        found, _ = self.mask_decoder(self.neck(maps), place, sparse, dense, multimask_output=False)
        logits: Tensor = F.interpolate(
            found[:, 0].float(), size=(self.size_px, self.size_px), mode="bilinear", align_corners=False
        )
        return logits[:, 0]

    def _places(self) -> Tensor:
        """Return SAM's embedding of the cells' places [1, 256, rows, cols]."""
        ends = (torch.arange(self.grid, device=next(self.prompt_encoder.parameters()).device) + 0.5) / self.grid
        y, x = torch.meshgrid(ends, ends, indexing="ij")
        embedded: Tensor = self.prompt_encoder.shared_embedding(torch.stack([x, y], dim=-1))
        return embedded.permute(2, 0, 1).unsqueeze(0)


def token_width(backbone: Backbone, channels: int) -> int:
    """Return the channels of a backbone's map, by asking it with an empty picture: SAM's encoders end in a neck."""
    fixed = backbone.network.fixed_px
    rows, cols = fixed or (2 * math.lcm(backbone.patch_size, backbone.contract.multiple_px),) * 2
    device = next(backbone.parameters()).device
    with torch.no_grad():
        return int(backbone.tokens(torch.zeros(1, channels, rows, cols, device=device)).patches.shape[1])


def check_model(backbone: Backbone, size_px: int) -> None:
    """Refuse a size that a model cannot take, or a model without an image encoder.

    Raises:
        ConfigError: Says what is possible.
    """
    if not backbone.embed_dim:
        raise ConfigError("--model none has no image encoder; prompts need one")
    patch = backbone.patch_size
    if size_px % patch:
        raise ConfigError(f"size_px is {size_px}, and model {backbone.name} has cells of {patch} px: use a multiple of {patch}")
    backbone.contract.check_size(size_px, f"model {backbone.name} (size_px)")
    fixed = backbone.network.fixed_px
    if fixed is not None and tuple(fixed) != (size_px, size_px):
        raise ConfigError(f"size_px is {size_px}, and model {backbone.name} is built for pictures of {fixed[0]} px")


def _sam_parts(size_px: int, patch_px: int, config: DecoderConfig) -> tuple[Any, Any]:
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("prompts need transformers, which is not installed: pip install 'meddino[baselines]'")
    from transformers import SamConfig
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

    sam = SamConfig(
        prompt_encoder_config={"image_size": size_px, "patch_size": patch_px},
        mask_decoder_config={"mlp_dim": config.mlp_dim, "num_hidden_layers": config.layers},
    )
    sam.mask_decoder_config._attn_implementation = "sdpa"
    return SamPromptEncoder(sam), SamMaskDecoder(sam.mask_decoder_config)


def load_sam(network: PromptNetwork, path: Path) -> None:
    """Fill prompt encoder and mask decoder from SAM's or MedSAM's own file, or transformers' safetensors of it.

    Raises:
        CheckpointError: It is missing, damaged or lacks a tensor; names them.
    """
    tensors = renamed(read_weights_file(path).tensors)
    for name, module in (("prompt_encoder", network.prompt_encoder), ("mask_decoder", network.mask_decoder)):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        wanted = module.state_dict()
        if "shared_image_embedding.positional_embedding" in tensors:  # transformers' files have it once for both
            own.setdefault("shared_embedding.positional_embedding", tensors["shared_image_embedding.positional_embedding"])
        lacking = [key for key, value in wanted.items() if own.get(key) is None or own[key].shape != value.shape]
        if lacking:
            raise CheckpointError(
                f"{path} is no SAM that fits: {len(lacking)} of {len(wanted)} tensors of its {name} are missing or have "
                f"another shape ({', '.join(lacking[:4])}); see decoder.mlp_dim and decoder.layers"
            )
        module.load_state_dict({key: own[key] for key in wanted}, strict=True)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of SAM's own file under transformers' names; a file that has them already keeps them."""
    if not any("output_upscaling" in name for name in tensors):
        return dict(tensors)
    found = {}
    for name, value in tensors.items():
        for pattern, replacement in _TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        found[name] = value
    return found
