"""MODEL of the command line: whatever `load_backbone` knows, or `none` for networks of their own."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import CheckpointError, ConfigError
from meddino.data.intensity import CTIntensity
from meddino.models.vision_transformer import VisionTransformer
from meddino_evaluation.backbones.adapter import Backbone, Tokens, state_hash
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.segmentation.networks.network import EncoderSource

NONE = "none"


class NoBackbone(Backbone):
    """Stands where a network of its own (U-Net, SegFormer, ...) reads nothing but the image."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.name, self.spec, self.lineage, self.embed_dim, self.patch_size = NONE, "", {}, 0, 1
        self.contract = ImageContract((), (), 1, 1, CTIntensity(channels=1))

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """There are none."""
        raise ConfigError("model none has no tokens")

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """Return no map."""
        return []

    def stages(self) -> Sequence[nn.Module]:
        """Return no stage."""
        return []

    def hash(self) -> str:
        """Return that of no tensors."""
        return state_hash(self)


def load_encoder(model: str, random_seed: int = 0) -> EncoderSource:
    """Load what MODEL means.

    Args:
        model: What `load_backbone` knows (an export, a run, a checkpoint, a weights file, `random:<backbone>`,
            `random:<export folder>` for its architecture and input contract with fresh weights, ...), or `none`.
        random_seed: Seed of fresh weights.

    Raises:
        ConfigError: Nothing of that name exists.
        CheckpointError: It exists and is damaged or of another kind.
    """
    backbone = NoBackbone() if model == NONE else load_backbone(model, random_seed)
    vit = None if model == NONE else backbone.network
    if isinstance(vit, VisionTransformer) and vit.config.in_chans != backbone.contract.channels:
        raise CheckpointError(
            f"model {model}: its patch embedding takes {vit.config.in_chans} channels, its input contract says "
            f"{backbone.contract.channels}"
        )
    return EncoderSource(backbone.spec or model, backbone, backbone.contract, backbone.hash(), dict(backbone.lineage))
