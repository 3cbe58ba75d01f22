"""The model folder that people share: model.safetensors, config.json, MODEL_CARD.md. Never a pickle."""

import hashlib
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from meddino.checkpoints.state.verify import MAX_META_BYTES
from meddino.core.config import StrictConfig, check_config
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import atomic_write, canonical_json, sha256_file, told_by_system, write_json
from meddino.data.intensity import Intensity
from meddino.models.registry import BackboneConfig
from meddino.models.timm_backbone import TimmConfig
from meddino.models.vision_transformer import ViTConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "MODEL_CARD.md"
FORMAT = "meddino-model"
RECORD_KEY = "meddino"
VERSION = 1
OWN_LICENCE = "Apache-2.0"
DINOV3_LICENCE = "DINOv3 License"
BUFFERS = (".bias_mask", "rope_embed.periods", ".running_mean", ".running_var", ".num_batches_tracked")


class Architecture(ViTConfig):
    """The backbone's shape, under the name it goes by."""

    name: str = "custom"
    """Registry name, or 'custom'."""

    def backbone_config(self) -> BackboneConfig:
        """Return it without the name."""
        return ViTConfig(**self.model_dump(exclude={"name"}))

    @property
    def kind(self) -> str:
        """What it is, for the card."""
        return "vision transformer"

    @property
    def in_words(self) -> str:
        """Its sizes, for the card."""
        return (
            f"{self.depth} blocks, {self.num_heads} heads, width {self.embed_dim}, patch {self.patch_size} px, "
            f"{self.num_registers} register tokens, {self.ffn_layer} x {self.ffn_ratio:g}"
        )

    @property
    def sides(self) -> str:
        """Which sides of images it takes, for the card; "" for any."""
        return f"Sides that are multiples of {self.patch_size} px"


class TimmArchitecture(TimmConfig):
    """The same for a model of timm."""

    name: str
    """timm:<its name>."""

    def backbone_config(self) -> BackboneConfig:
        """Return it without the name."""
        return TimmConfig(**self.model_dump(exclude={"name"}))

    @property
    def kind(self) -> str:
        """See `Architecture`."""
        return "network"

    @property
    def in_words(self) -> str:
        """See `Architecture`."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return (
            f"timm's {self.timm}{f' with {arguments}' if arguments else ''} (timm {self.timm_version}), width "
            f"{self.embed_dim}, one patch token every {self.patch_size} px"
        )

    @property
    def sides(self) -> str:
        """See `Architecture`."""
        return ""


def _kind_of(values: Any) -> str:
    return "timm" if isinstance(values, TimmConfig) or (isinstance(values, dict) and "timm" in values) else "vit"


AnyArchitecture = Annotated[
    Annotated[Architecture, Tag("vit")] | Annotated[TimmArchitecture, Tag("timm")], Discriminator(_kind_of)
]


def read_architecture(values: Any, where: str) -> AnyArchitecture:
    """Check an architecture as checkpoints and exports carry it.

    Raises:
        ConfigError: Names every wrong key.
    """
    if _kind_of(values) == "timm":
        return check_config(TimmArchitecture, values, where=where)
    return check_config(Architecture, values, where=where)


def architecture_of_config(config: BackboneConfig, name: str) -> AnyArchitecture:
    """Return an architecture under a name."""
    if isinstance(config, TimmConfig):
        return TimmArchitecture(**config.model_dump(), name=name)
    return Architecture(**config.model_dump(), name=name)


class StageRecord(StrictConfig):
    """One stage that the weights went through."""

    name: str
    """Name in the stage graph."""
    steps: int = Field(ge=0)
    """Optimizer steps taken in it."""


class ParentRecord(StrictConfig):
    """The weights that training started from."""

    name: str
    """File or model name, without a machine's path."""
    sha256: str | None = None
    """Of the file, where it was one."""
    licence: str
    """Licence of those weights; it travels along."""


class DataRecord(StrictConfig):
    """One data set of the training corpus."""

    dataset: str
    """Name in volumes.parquet."""
    licence: str = "unknown"
    """As recorded at curation."""
    volumes: int | None = None
    """Accepted volumes."""


class TrainingVolumesRecord(StrictConfig):
    """The list of the volumes of the training corpus, in training_volumes.txt beside config.json."""

    sha256: str
    """Of the file."""
    volumes: int = Field(ge=0)
    """lines: different volumes by the content of their voxels."""


class Lineage(StrictConfig):
    """Where the weights come from."""

    corpus_hash: str | None = None
    """Content hash of the corpus; none for random weights."""
    data: tuple[DataRecord, ...] = ()
    """Data sets with their licences."""
    training_volumes: TrainingVolumesRecord | None = None
    """List of content hashes, for finding test volumes in it."""
    audited_against: tuple[str, ...] = ()
    """Test sets that the corpus was audited against."""
    stages: tuple[StageRecord, ...] = ()
    """Stages in the order they ran."""
    parent: ParentRecord | None = None
    """none: trained from scratch."""
    licence: str = OWN_LICENCE
    """Licence of these weights."""


class WeightsRecord(StrictConfig):
    """What model.safetensors holds."""

    file: str = WEIGHTS_FILE
    """File name in this folder."""
    sha256: str
    """Of the file."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Of the floating-point weights."""
    parameters: int = Field(ge=0)
    """Number of parameters of the backbone."""
    role: Literal["teacher", "student", "backbone"]
    """Which network of the trainer this is."""


class FileRecord(StrictConfig):
    """What model.safetensors says of itself, in its metadata: a file copied without config.json loads as what it is."""

    version: Literal[1] = 1
    """Of the record."""
    architecture: AnyArchitecture
    """What to build."""
    input_contract: Intensity
    """How stored values become input."""
    role: Literal["teacher", "student", "backbone"]
    """Which network of the trainer this is."""
    licence: str
    """Of these weights."""


class ModelConfig(StrictConfig):
    """The content of config.json."""

    format: Literal["meddino-model"] = "meddino-model"
    """Says what this folder is."""
    version: Literal[1] = 1
    """Of the format."""
    architecture: AnyArchitecture
    """What to build."""
    input_contract: Intensity
    """How stored values become input."""
    resolutions_px_seen: tuple[int, ...] = ()
    """Sides of the global crops in training [px]."""
    lineage: Lineage = Lineage()
    """Where the weights come from."""
    weights: WeightsRecord
    """The weights file."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Figures given at export."""
    command: str
    """That made this folder, without paths."""
    meddino_version: str
    """That made this folder."""


def meddino_version() -> str:
    """Return the installed version of MedDINO."""
    try:
        return version("meddino")
    except PackageNotFoundError:
        return "0+unknown"


def write_weights(path: Path, tensors: dict[str, Tensor], record: FileRecord | None = None) -> None:
    """Write a safetensors file; equal tensors and records give equal bytes."""
    # One metadata key only: several would be written in a changing order. The record is put in afterwards.
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise told_by_system(error, path) from error
    if record is not None:
        with path.open("rb") as plain, atomic_write(path) as stream:
            stream.write(_header_with(record, plain.read(int.from_bytes(plain.read(8), "little"))))
            shutil.copyfileobj(plain, stream, 16 << 20)
    # safetensors makes files that only their owner can read; these are for sharing, as far as the umask lets them.
    path.chmod(0o666 & ~_umask())


def read_record(path: Path) -> FileRecord | None:
    """Return what a weights file of ours says of itself; None for other files.

    Raises:
        CheckpointError: It says something that this program does not understand.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if RECORD_KEY not in metadata:
        return None
    try:
        return check_config(FileRecord, json.loads(metadata[RECORD_KEY]), where=f"{path}, its metadata")
    except (ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: what its metadata say of the model cannot be used: {error}") from error


def _header_with(record: FileRecord, header: bytes) -> bytes:
    """Return a safetensors file's header with its length, the record put into its metadata."""
    content = json.loads(header)
    content["__metadata__"][RECORD_KEY] = canonical_json(record.model_dump(mode="json"))
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write config.json: sorted, without a date, so that equal models give equal bytes."""
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))


def weights_sha256(tensors: dict[str, Tensor], record: FileRecord) -> str:
    """Return the SHA-256 that `write_weights`'s file would have."""
    plain = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    end = 8 + int.from_bytes(plain[:8], "little")
    digest = hashlib.sha256(_header_with(record, plain[8:end]))
    digest.update(memoryview(plain)[end:])
    return digest.hexdigest()


def is_model_folder(folder: Path) -> bool:
    """Tell by its config.json whether a folder is an export of ours."""
    path = folder / CONFIG_FILE
    if not path.is_file() or path.stat().st_size > MAX_META_BYTES:
        return False
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_config(folder: Path) -> ModelConfig:
    """Return the checked config.json of a model folder.

    Raises:
        CheckpointError: If it is missing, damaged, of another kind or of a newer version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no exported model: it has no {CONFIG_FILE}; make one with meddino-export")
    if path.stat().st_size > MAX_META_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_META_BYTES >> 20} MiB and no model's {CONFIG_FILE}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a MedDINO model (format is not '{FORMAT}'); make one with meddino-export")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')}; this program reads {VERSION}: update meddino")
    try:
        return check_config(ModelConfig, content, where=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a model folder after comparing the file with its checksum.

    Raises:
        CheckpointError: If the file is missing, truncated, not the one that config.json names, or says another thing of
            itself than config.json does.
    """
    path = folder / config.weights.file
    if Path(config.weights.file).name != config.weights.file or not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the model folder again, with all its files")
    found = sha256_file(path)
    if found != config.weights.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:12]}..., config.json names {config.weights.sha256[:12]}...; the file is damaged or "
            "was replaced: copy the model folder again"
        )
    _check_record(read_record(path), config, folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error


def _check_record(said: FileRecord | None, config: ModelConfig, folder: Path) -> None:
    """Refuse a config.json that was changed by hand: the weights file has the same of its own, under the checksum."""
    if said is None:
        return
    own = FileRecord(
        architecture=config.architecture,
        input_contract=config.input_contract,
        role=config.weights.role,
        licence=config.lineage.licence,
    ).model_dump(mode="json")
    for key, there in said.model_dump(mode="json").items():
        here = own[key]
        differ = [name for name in there if here.get(name) != there[name]] if isinstance(there, dict) else []
        if differ:
            said_here, said_there = f"{key}.{differ[0]} {here.get(differ[0])}", there[differ[0]]
        else:
            said_here, said_there = f"{key} {here}", there
        if here != there:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} says {said_here}, its weights were written with {said_there}: config.json was changed "
                "by hand or is another model's; copy the model folder again, or make one with meddino-export"
            )


def parameter_count(tensors: dict[str, Tensor]) -> int:
    """Return the number of parameters; masks, rotary periods and running statistics are none."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(BUFFERS))


def check_names(tensors: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    """Compare names and shapes of tensors with those of a model.

    Raises:
        CheckpointError: Names what is missing, unexpected or of another shape.
    """
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
        "not finite": [
            name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
        ],
    }
    found = [
        f"{what} ({len(names)}): {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{where}: the weights do not fit the architecture: {'; '.join(found)}")
