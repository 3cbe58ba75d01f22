"""What a recipe says about masked autoencoding: the view, the mask, the decoder."""

from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino_pretrain.methods.config import Fraction, MethodConfig, Terms, check_ascending


class DecoderConfig(StrictConfig):
    """The transformer that paints the patches; it is no part of an export."""

    dim: int = Field(512, ge=4)
    """Width; MAE: 512."""
    depth: int = Field(8, ge=1)
    """Blocks; MAE: 8."""
    heads: int = Field(16, ge=1)
    """Attention heads, dim / heads a multiple of 4; MAE: 16."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "DecoderConfig":
        if self.dim % self.heads or self.dim // self.heads % 4:
            raise ValueError(f"dim {self.dim} over heads {self.heads} must be a whole multiple of 4 (rotary embedding)")
        return self


class MaskedImageConfig(MethodConfig):
    """MAE: most patches of a crop are left away, and painted from what the others say."""

    name: Literal["masked_image"] = "masked_image"
    """The method."""
    crop_px: int = Field(224, gt=0)
    """Side of the crop [px]; MAE: 224."""
    area: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Share of the slice's area in the crop [0-1]; MAE: 0.2-1."""
    aspect_ratio: tuple[float, float] = (0.75, 1.333333333)
    """Width / height of the crop's box, in millimetres; torchvision: 3/4-4/3."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a horizontal flip [0-1]; MAE: 0.5."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that are left away [0-1]; MAE: 0.75."""
    normalised_targets: bool = True
    """Whether each patch is painted less its mean and over its deviation; MAE: true."""
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "MaskedImageConfig":
        check_ascending({name: getattr(self, name) for name in ("area", "aspect_ratio")})
        return self

    @property
    def terms(self) -> Terms:
        """See `MethodConfig`: 1 is what painting each patch in its mean costs."""
        chance = {"reconstruction": 1.0} if self.normalised_targets else {}
        return Terms(losses=("reconstruction",), chance=chance, advice="the mask's ratio")
