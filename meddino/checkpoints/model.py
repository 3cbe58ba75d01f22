"""A model as people use it: weights, architecture, input contract and lineage together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.checkpoints.model_folder import (
    Architecture,
    Lineage,
    ModelConfig,
    WeightsRecord,
    check_names,
    meddino_version,
    parameter_count,
    read_config,
    read_weights,
    weights_sha256,
)
from meddino.core.errors import CheckpointError
from meddino.data.contract import InputContract
from meddino.models.registry import backbone_config, tapped_blocks
from meddino.models.vision_transformer import VisionTransformer, ViTConfig, ViTOutput

RANDOM_PREFIX = "random:"


class Model(nn.Module):
    """A backbone with its input contract and its lineage.

    Attributes:
        backbone: The vision transformer.
        config: Everything config.json says.
    """

    def __init__(self, backbone: VisionTransformer, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config

    @property
    def contract(self) -> InputContract:
        """How Hounsfield units become input."""
        return self.config.input_contract

    @property
    def lineage(self) -> Lineage:
        """Corpus, stages, parent weights and licences."""
        return self.config.lineage

    @property
    def embed_dim(self) -> int:
        """Width of the tokens."""
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch [px]; image sides are multiples of it."""
        return self.backbone.patch_size

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.backbone.depth

    def preprocess(self, hu: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch c h w"]:
        """Turn Hounsfield units into model input by the input contract; see `InputContract.apply`."""
        return self.contract.apply(hu)

    def forward_features(self, images: Float[Tensor, "batch c h w"]) -> ViTOutput:
        """Return the normalised CLS, register and patch tokens.

        Args:
            images: From `preprocess`; sides are multiples of `patch_size`.
        """
        output: ViTOutput = self.backbone(images)
        return output

    def forward(self, images: Float[Tensor, "batch c h w"]) -> ViTOutput:
        """Return `forward_features(images)`."""
        return self.forward_features(images)

    def get_intermediate_layers(
        self, images: Float[Tensor, "batch c h w"], blocks: Sequence[int] | None = None, *, norm: bool = True
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Return patch tokens after some blocks as maps.

        Args:
            images: From `preprocess`.
            blocks: From 0; None takes the four that segmentation reads (2, 5, 8, 11 of 12).
            norm: Apply the last LayerNorm to each.
        """
        chosen = tapped_blocks(self.depth, min(4, self.depth)) if blocks is None else blocks
        return self.backbone.get_intermediate_layers(images, chosen, norm=norm)


def load(source: str | Path, *, seed: int = 0) -> Model:
    """Load a model for use: on the CPU, in float32, in evaluation mode.

    Args:
        source: A folder made by meddino-export; or `random:<name>` with a backbone's name or such a folder, for the
            same architecture (and contract) with random weights.
        seed: Of random weights.

    Raises:
        CheckpointError: If it is missing, damaged or does not fit; the message says what to do.
        ConfigError: If a backbone's name is unknown.
    """
    text = str(source)
    if text.startswith(RANDOM_PREFIX):
        return _load_random(text.removeprefix(RANDOM_PREFIX), seed)
    folder = Path(source)
    if not folder.exists():
        raise CheckpointError(f"no model at {folder}; give a folder made by meddino-export, or random:<backbone>")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder made by meddino-export that holds config.json")
    config = read_config(folder)
    return assemble(config, read_weights(folder, config), where=str(folder))


def assemble(config: ModelConfig, tensors: dict[str, Tensor], where: str) -> Model:
    """Build the architecture that a config names and fill in the weights, all of them.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    backbone = VisionTransformer(config.architecture.vit_config())
    check_names(tensors, backbone.state_dict(), where)
    backbone.load_state_dict(tensors, strict=True)
    return Model(backbone, config).eval().requires_grad_(False)


def random_model(
    architecture: str | ViTConfig, seed: int = 0, contract: InputContract | None = None, *, name: str | None = None
) -> Model:
    """Return a model with random weights, for comparison with a trained one.

    Args:
        architecture: A backbone's name or its config.
        seed: Of the weights; torch's own generator is left as it was.
        contract: The input contract; the default one if None.
        name: Name to record; by default the backbone's name.
    """
    vit = backbone_config(architecture) if isinstance(architecture, str) else architecture
    label = name or (architecture if isinstance(architecture, str) else "custom")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = VisionTransformer(vit)
    tensors = backbone.state_dict()
    weights = WeightsRecord(
        sha256=weights_sha256(tensors), dtype="float32", parameters=parameter_count(tensors), role="backbone"
    )
    config = ModelConfig(
        architecture=Architecture(**vit.model_dump(), name=label),
        input_contract=contract or InputContract(),
        weights=weights,
        command=f"random:{label} seed={seed}",
        meddino_version=meddino_version(),
    )
    return Model(backbone, config).eval().requires_grad_(False)


def _load_random(name: str, seed: int) -> Model:
    folder = Path(name)
    if folder.is_dir():
        reference = read_config(folder)
        architecture = reference.architecture
        return random_model(architecture.vit_config(), seed, reference.input_contract, name=architecture.name)
    return random_model(name, seed)
