"""A model as people use it: weights, architecture, input contract and lineage together."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from meddino.checkpoints.export.model_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AnyArchitecture,
    FileRecord,
    Lineage,
    ModelConfig,
    ParentRecord,
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
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import sha256_file
from meddino.core.logging import get_logger
from meddino.data.intensity import CTIntensity, Intensity
from meddino.data.model_input import normalise
from meddino.models.backbone import Backbone, BackboneOutput
from meddino.models.registry import BackboneConfig, backbone_config, backbone_from_config
from meddino.models.vision_transformer import VisionTransformer
from meddino.models.volume_tokens import VolumeTokens, as_stored, encode, padded
from meddino.volumes.read import read_volume
from meddino.volumes.volume import Volume

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
        self, stored: Any, value_range: Float[Tensor, "*batch 2"] | Sequence[float] | None = None
    ) -> Float[Tensor, "*batch c h w"]:
        """Turn grey values into model input by the input contract; see `meddino.data.model_input.normalise`.

        Sides that are no multiples of the patch are padded with the lowest value at the bottom and the right; a warning
        says so.

        Args:
            stored: A tensor or array [..., H, W], of a CT model Hounsfield units, of others values in [0, 1], or any with
                their range; or a `Volume`: all its slices, turned to axial ones, by its own range.
            value_range: Values that become 0 and 1; see `meddino.data.stored_values.value_range`.

        Raises:
            ConfigError: The values cannot be what the contract says.
        """
        values, limits = as_stored(stored, self.contract, value_range)
        images, note = padded(normalise(values, self.contract, limits), self.contract, self._side_multiple)
        if note:
            warnings.warn(f"images were {note}", stacklevel=2)
        return images

    @property
    def _side_multiple(self) -> int:
        return math.lcm(self.backbone.multiple_px, self.backbone.patch_size)

    @torch.inference_mode()
    def encode_volume(self, volume: Volume | str | Path, batch: int = 8, size_px: int | None = None) -> VolumeTokens:
        """Return the patch tokens of every axial slice of a volume, and where each lies in the patient.

        Args:
            volume: From `meddino.read_volume`, or its path.
            batch: Slices at a time.
            size_px: Longer side that slices are resized to; None keeps their own pixels.

        Returns:
            Tokens [Z, h, w, D] on the CPU with the affine of their grid, CLS tokens [Z, D], which patches are body, and notes
            on what was decided.

        Raises:
            ConfigError: The file says that it is of another modality than the model's.
            VolumeError: It cannot be read, or holds values that are no numbers.
        """
        read = volume if isinstance(volume, Volume) else read_volume(Path(volume))
        return encode(self.backbone, self.contract, read, batch, size_px)

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
        self,
        x: Float[Tensor, "batch c h w"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
        """Return the tokens after some blocks, as DINOv2's and DINOv3's method of that name does.

        Args:
            x: From `preprocess`.
            n: The last so many blocks, or the numbers of blocks, from 0.
            reshape: Patch tokens as maps [B, D, h, w] instead of [B, N, D].
            return_class_token: Each item is a pair: patch tokens, CLS token [B, D].
            return_extra_tokens: Also the register tokens [B, R, D].
            norm: Apply the last LayerNorm to each.

        Returns:
            One item a block, in the order of the blocks.

        Raises:
            ConfigError: A block does not exist.
        """
        blocks = list(range(self.depth - n, self.depth)) if isinstance(n, int) else sorted(n)
        if not blocks or any(not 0 <= block < self.depth for block in blocks):
            raise ConfigError(f"n={n}: this model has {self.depth} blocks, numbered from 0 to {self.depth - 1}")
        outputs = self.backbone.intermediate_outputs(x, blocks, norm=norm)
        patches = tuple(output.patch_map if reshape else output.patch_tokens for output in outputs)
        extra = [tuple(output.cls_token for output in outputs)] if return_class_token else []
        extra += [tuple(output.register_tokens for output in outputs)] if return_extra_tokens else []
        return tuple(zip(patches, *extra, strict=True)) if extra else patches

    def __repr__(self) -> str:
        channels, multiple, dim = self.contract.channels, self._side_multiple, self.embed_dim
        count = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join(
            [
                f"Model {self.config.architecture.name}: {count / 1e6:.1f} M parameters, {self.depth} blocks, patch "
                f"{self.patch_size} px, {self.config.weights.role}, licence {self.lineage.licence}",
                f"  input   [B, {channels}, H, W], H and W multiples of {multiple}: {self.contract.in_words}",
                f"  output  cls_token [B, {dim}], register_tokens [B, {getattr(self.backbone.config, 'num_registers', 'R')}, "
                f"{dim}], patch_tokens [B, H/{self.patch_size} * W/{self.patch_size}, {dim}]",
            ]
        )


def load(source: str | Path, *, seed: int = 0, contract: Intensity | None = None) -> Model:
    """Load a model for use: on the CPU, in float32, in evaluation mode.

    Args:
        source: A folder made by meddino-export; a run or training checkpoint (its teacher); any file or folder that
            `find_weights` reads (official, timm, transformers); or `random:<name>` with a backbone's name, a folder
            made by meddino-export, a run or a checkpoint, for the same architecture (and contract) with random weights.
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
    architecture: AnyArchitecture,
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
    if not folder.is_dir():
        return random_model(name, seed)
    if is_training_output(folder):
        found = read_source(folder)
        architecture, contract = found.architecture, found.contract
    else:
        config = read_config(folder)
        architecture, contract = config.architecture, config.input_contract
    return random_model(architecture.backbone_config(), seed, contract, name=architecture.name)
