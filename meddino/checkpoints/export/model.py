"""A model as people use it: weights, architecture, input contract and lineage together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from meddino.checkpoints.export.model_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Architecture,
    FileRecord,
    Lineage,
    ModelConfig,
    ParentRecord,
    TimmArchitecture,
    WeightsRecord,
    architecture_of_config,
    check_names,
    is_model_folder,
    meddino_version,
    parameter_count,
    read_config,
    read_record,
    read_weights,
    weights_sha256,
)
from meddino.checkpoints.export.source import Role, read_source
from meddino.checkpoints.weights.coverage import LoadingTolerances
from meddino.checkpoints.weights.find_weights import find_weights, is_training_output
from meddino.checkpoints.weights.infer_architecture import backbone_name
from meddino.checkpoints.weights.load import fit
from meddino.core.errors import CheckpointError
from meddino.core.files import sha256_file
from meddino.core.logging import get_logger
from meddino.data.intensity import CTIntensity, Intensity
from meddino.data.model_input import normalise
from meddino.models.backbone import Backbone, BackboneOutput
from meddino.models.registry import BackboneConfig, backbone_config, backbone_from_config, tapped_blocks
from meddino.models.vision_transformer import VisionTransformer

RANDOM_PREFIX = "random:"
_log = get_logger(__name__)


class Model(nn.Module):
    """A backbone with its input contract and its lineage.

    Attributes:
        backbone: The network.
        config: Everything config.json says.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config

    @property
    def contract(self) -> Intensity:
        """How stored values become input."""
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
        """Pixels between patch tokens; image sides are multiples of `backbone.multiple_px`."""
        return self.backbone.patch_size

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.backbone.depth

    def preprocess(
        self, stored: Float[Tensor, "*batch h w"], value_range: Float[Tensor, "*batch 2"] | None = None
    ) -> Float[Tensor, "*batch c h w"]:
        """Turn grey values into model input by the input contract; see `meddino.data.model_input.normalise`.

        Args:
            stored: Of a CT model Hounsfield units; of others values in [0, 1], or any with their range.
            value_range: Values that become 0 and 1; see `meddino.data.model_input.value_range`.
        """
        return normalise(stored, self.contract, value_range)

    def forward_features(self, images: Float[Tensor, "batch c h w"]) -> BackboneOutput:
        """Return the normalised CLS, register and patch tokens.

        Args:
            images: From `preprocess`; sides are multiples of `backbone.multiple_px`.
        """
        return self.backbone.tokens(images)

    def forward(self, images: Float[Tensor, "batch c h w"]) -> BackboneOutput:
        """Return `forward_features(images)`."""
        return self.forward_features(images)

    def get_intermediate_layers(
        self, images: Float[Tensor, "batch c h w"], blocks: Sequence[int] | None = None, *, norm: bool = True
    ) -> list[Float[Tensor, "batch _dim _rows _columns"]]:
        """Return patch tokens after some blocks as maps.

        Args:
            images: From `preprocess`.
            blocks: From 0; None takes the four that segmentation reads (2, 5, 8, 11 of 12).
            norm: Apply the last LayerNorm to each.
        """
        chosen = tapped_blocks(self.depth, min(4, self.depth)) if blocks is None else blocks
        return self.backbone.get_intermediate_layers(images, chosen, norm=norm)


def load(source: str | Path, *, seed: int = 0, contract: Intensity | None = None) -> Model:
    """Load a model for use: on the CPU, in float32, in evaluation mode.

    Args:
        source: A folder made by meddino-export; a run or training checkpoint (its teacher); any file or folder that
            `find_weights` reads (official, timm, transformers); or `random:<name>` with a backbone's name or a folder
            made by meddino-export, for the same architecture (and contract) with random weights.
        seed: Of random weights.
        contract: For foreign weights, which come without one: how stored values become input; by default MedDINOv3's.

    Raises:
        CheckpointError: If it is missing, damaged or does not fit; the message says what to do.
        ConfigError: If a backbone's name is unknown.
    """
    text = str(source)
    if text.startswith(RANDOM_PREFIX):
        return _load_random(text.removeprefix(RANDOM_PREFIX), seed)
    path = Path(source)
    if is_model_folder(path):
        config = read_config(path)
        return assemble(config, read_weights(path, config), where=text)
    if is_training_output(path):
        found = read_source(path)
        record = (found.architecture, found.contract, found.resolutions_px_seen, found.lineage, found.role)
        return assemble(
            _config_of(found.tensors, *record, command="teacher of a training checkpoint"), found.tensors, where=text
        )
    alone = path / WEIGHTS_FILE if path.is_dir() and not (path / CONFIG_FILE).exists() else path
    if (said := read_record(alone) if alone.is_file() else None) is not None:
        return _from_record(alone, said)
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{path} is empty; give a folder made by meddino-export, a weights file, or random:<backbone>")
    weights = find_weights(source)
    # Nothing but training reads the mask token, and timm's files are without it.
    fitted = fit(weights, weights.config, LoadingTolerances(missing=("mask_token",)))
    _log.info("%s", fitted.coverage.text())
    backbone = VisionTransformer(weights.config)
    fitted.load_into(backbone)
    architecture = architecture_of_config(weights.config, backbone_name(weights.config))
    lineage = Lineage(parent=weights.parent, licence=weights.parent.licence)
    config = _config_of(
        backbone.state_dict(),
        architecture,
        contract or CTIntensity(),
        (),
        lineage,
        "backbone",
        command=f"read from {path.name}",
    )
    return Model(backbone, config).eval().requires_grad_(False)


def _from_record(path: Path, said: FileRecord) -> Model:
    """Load a weights file of ours that lies without its config.json."""
    tensors = load_file(path)
    parent = ParentRecord(name=path.name, sha256=sha256_file(path), licence=said.licence)
    lineage = Lineage(parent=parent, licence=said.licence)
    record = (said.architecture, said.input_contract, (), lineage, said.role)
    return assemble(_config_of(tensors, *record, command=f"read from {path.name}"), tensors, where=str(path))


def assemble(config: ModelConfig, tensors: dict[str, Tensor], where: str) -> Model:
    """Build the architecture that a config names and fill in the weights, all of them.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    backbone = backbone_from_config(config.architecture.backbone_config())
    check_names(tensors, backbone.state_dict(), where)
    backbone.load_state_dict(tensors, strict=True)
    return Model(backbone, config).eval().requires_grad_(False)


def random_model(
    architecture: str | BackboneConfig, seed: int = 0, contract: Intensity | None = None, *, name: str | None = None
) -> Model:
    """Return a model with random weights, for comparison with a trained one.

    Args:
        architecture: A backbone's name or its config.
        seed: Of the weights; torch's own generator is left as it was.
        contract: The input contract; the default one if None.
        name: Name to record; by default the backbone's name.
    """
    built = backbone_config(architecture) if isinstance(architecture, str) else architecture
    label = name or (architecture if isinstance(architecture, str) else "custom")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = backbone_from_config(built)
    architecture_record = architecture_of_config(built, label)
    config = _config_of(
        backbone.state_dict(),
        architecture_record,
        contract or CTIntensity(),
        (),
        Lineage(),
        "backbone",
        command=f"random:{label} seed={seed}",
    )
    return Model(backbone, config).eval().requires_grad_(False)


def _config_of(
    tensors: dict[str, Tensor],
    architecture: Architecture | TimmArchitecture,
    contract: Intensity,
    resolutions_px_seen: tuple[int, ...],
    lineage: Lineage,
    role: Role,
    *,
    command: str,
) -> ModelConfig:
    """Describe weights that did not come from a model folder; the checksum is that of the file they would make."""
    said = FileRecord(architecture=architecture, input_contract=contract, role=role, licence=lineage.licence)
    weights = WeightsRecord(
        sha256=weights_sha256(tensors, said), dtype="float32", parameters=parameter_count(tensors), role=role
    )
    return ModelConfig(
        architecture=architecture,
        input_contract=contract,
        resolutions_px_seen=resolutions_px_seen,
        lineage=lineage,
        weights=weights,
        command=command,
        meddino_version=meddino_version(),
    )


def _load_random(name: str, seed: int) -> Model:
    folder = Path(name)
    if folder.is_dir():
        reference = read_config(folder)
        architecture = reference.architecture
        return random_model(architecture.backbone_config(), seed, reference.input_contract, name=architecture.name)
    return random_model(name, seed)
