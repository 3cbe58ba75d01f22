"""What an export is made from: a run, a training checkpoint, or a model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from meddino.checkpoints.export.lineage import find_volume_list
from meddino.checkpoints.export.model_folder import (
    DINOV3_LICENCE,
    AnyArchitecture,
    Lineage,
    is_model_folder,
    read_architecture,
    read_config,
    read_weights,
)
from meddino.checkpoints.state.names import META_FILE, list_checkpoints
from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import Checkpoint, latest_checkpoint, verify_checkpoint
from meddino.core.config import check_config
from meddino.core.errors import CheckpointError, ConfigError
from meddino.data.intensity import Intensity, read_intensity

CHECKPOINTS_FOLDER = "checkpoints"
FROM_SCRATCH = "scratch"
HEADS = ("dino_head", "ibot_head")
Role = Literal["teacher", "student", "backbone"]


@dataclass(frozen=True)
class ExportSource:
    """A backbone with everything that travels with it.

    Attributes:
        tensors: The backbone's weights under official names.
        heads: Head -> its weights; empty where the source has none.
        role: Which network of the trainer it is.
        volumes: The list of the training volumes, where there is one.
    """

    tensors: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    architecture: AnyArchitecture
    contract: Intensity
    resolutions_px_seen: tuple[int, ...]
    lineage: Lineage
    role: Role
    metrics: dict[str, Any]
    volumes: str | None = None


def read_source(path: Path, stage: str | None = None, role: Role = "teacher") -> ExportSource:
    """Read a run, a training checkpoint or a model folder.

    Args:
        path: Any of them; for a run the last finished stage is taken.
        stage: Of a run: take this stage's last checkpoint, finished or not.
        role: "teacher" or "student" of a training checkpoint.

    Raises:
        CheckpointError: If there is nothing to export; the message says what was looked for.
    """
    if is_model_folder(path):
        config = read_config(path)
        return ExportSource(
            read_weights(path, config),
            {},
            config.architecture,
            config.input_contract,
            config.resolutions_px_seen,
            config.lineage,
            config.weights.role,
            dict(config.metrics),
            find_volume_list(path, config.lineage.training_volumes),
        )
    return _from_checkpoint(find_checkpoint(path, stage), role)


def find_checkpoint(path: Path, stage: str | None = None) -> Checkpoint:
    """Return the training checkpoint that a path means, after checking its contents.

    Args:
        path: A checkpoint folder, a folder of them, or a run.
        stage: Of a run: this stage's last checkpoint instead of the last finished stage's.

    Raises:
        CheckpointError: If there is none.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is {'a file' if path.is_file() else 'no folder'}; give a run, a training checkpoint or an exported model. "
            "Weights files of others are read where they are used (docs/weights.md)"
        )
    if (path / META_FILE).is_file():
        return verify_checkpoint(path)
    if list_checkpoints(path):
        return _usable(latest_checkpoint(path), path)
    stages = {folder.parent.name: folder for folder in sorted(path.glob(f"*/{CHECKPOINTS_FOLDER}")) if list_checkpoints(folder)}
    if not stages:
        raise CheckpointError(
            f"{path} holds neither a run's stages (<stage>/{CHECKPOINTS_FOLDER}/step-*), nor a training checkpoint "
            f"({META_FILE}), nor an exported model (config.json)"
        )
    if stage is not None:
        if stage not in stages:
            raise CheckpointError(
                f"run {path} has no checkpoint of stage '{stage}'; stages with checkpoints: {', '.join(stages)}"
            )
        return _usable(latest_checkpoint(stages[stage]), stages[stage])
    found = [checkpoint for folder in stages.values() if (checkpoint := latest_checkpoint(folder)) is not None]
    # By how many stages lie behind it; by name where two start from the same one.
    found.sort(key=lambda checkpoint: (len(_planned_stages(checkpoint)), checkpoint.folder.parent.parent.name))
    finished = [checkpoint for checkpoint in found if checkpoint.step >= _planned_stages(checkpoint)[-1]["steps"]]
    if not finished:
        raise CheckpointError(
            f"run {path} has no finished stage yet; wait, or name one with --stage to export its last checkpoint: "
            f"{', '.join(stages)}"
        )
    return finished[-1]


def _usable(checkpoint: Checkpoint | None, folder: Path) -> Checkpoint:
    if checkpoint is None:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; the lines above name each one's damage")
    return checkpoint


def _from_checkpoint(checkpoint: Checkpoint, role: Role) -> ExportSource:
    folder, meta = checkpoint.folder, checkpoint.meta
    # Where the method's exported backbone lies; a student beside it has the same name but for the first part.
    exported = str(meta.get("exported", "teacher.backbone"))
    name = exported if role == "teacher" else f"{role}.{exported.partition('.')[2]}"
    tensors = read_tensors(folder, f"{name}.")
    if not tensors and role == "teacher":
        tensors = read_tensors(folder, "backbone.")  # a kept backbone alone
    if not tensors:
        raise CheckpointError(f"{folder} holds no '{name}' weights; it was not written by meddino-pretrain")
    try:
        architecture = read_architecture(meta["backbone"], where=f"{folder}: backbone")
        contract = read_intensity(meta["input_contract"], where=f"{folder}: input_contract")
        lineage = _lineage(checkpoint)
        resolutions = tuple(int(size) for size in meta["lineage"].get("resolutions_px_seen", ()))
    except KeyError as error:
        raise CheckpointError(f"{folder / META_FILE} has no {error}; it was not written by meddino-pretrain") from error
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    heads = {head: read_tensors(folder, f"{role}.{head}.") for head in HEADS}
    heads = {head: weights for head, weights in heads.items() if weights}
    volumes = find_volume_list(folder, lineage.training_volumes)
    kind: Role = role if name.startswith(f"{role}.") else "backbone"
    return ExportSource(tensors, heads, architecture, contract, resolutions, lineage, kind, {}, volumes)


def _planned_stages(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the stages up to this checkpoint's own with their planned steps; a checkpoint without them counts as final."""
    given = checkpoint.meta.get("lineage", {}).get("stages") or [{"stage": checkpoint.meta.get("stage", ""), "steps": 0}]
    return [{"name": record.get("stage", record.get("name", "")), "steps": record["steps"]} for record in given]


def _lineage(checkpoint: Checkpoint) -> Lineage:
    given = checkpoint.meta["lineage"]
    stages = _planned_stages(checkpoint)
    stages[-1]["steps"] = checkpoint.step  # the last one may be unfinished
    parent = given.get("parent")
    if isinstance(parent, str):
        # Weights whose origin is not recorded are taken for Meta's: their licence asks for more than ours.
        parent = None if parent == FROM_SCRATCH else {"name": Path(parent).name, "licence": DINOV3_LICENCE}
    values = {
        "corpus_hash": given.get("corpus_hash") or checkpoint.meta.get("corpus_hash"),
        "data": given.get("data", []),
        "training_volumes": given.get("training_volumes"),
        "audited_against": given.get("audited_against", []),
        "stages": stages,
        "parent": parent,
    }
    lineage = check_config(Lineage, values, where=f"{checkpoint.folder}: lineage")
    # Weights derived from somebody's weights stay under that licence.
    return lineage.model_copy(update={"licence": lineage.parent.licence}) if lineage.parent else lineage
