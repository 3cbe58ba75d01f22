"""What an export is made from: a run, a training checkpoint, or a model folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from meddino.checkpoints.model_folder import (
    Architecture,
    Lineage,
    is_model_folder,
    read_config,
    read_weights,
)
from meddino.checkpoints.safetensors_storage import read_tensors
from meddino.checkpoints.training_state import (
    META_FILE,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from meddino.core.config import check_config
from meddino.core.errors import CheckpointError, ConfigError
from meddino.data.contract import InputContract

CHECKPOINTS_FOLDER = "checkpoints"
HEADS = ("dino_head", "ibot_head")
Role = Literal["teacher", "student", "backbone"]


@dataclass(frozen=True)
class ExportSource:
    """A backbone with everything that travels with it.

    Attributes:
        tensors: The backbone's weights under official names.
        heads: Head -> its weights; empty where the source has none.
        role: Which network of the trainer it is.
    """

    tensors: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    architecture: Architecture
    contract: InputContract
    resolutions_px_seen: tuple[int, ...]
    lineage: Lineage
    role: Role
    metrics: dict[str, Any]


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
        raise CheckpointError(f"{path} is no folder; give a run, a training checkpoint or an exported model")
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
    # By the place in the stage graph, where the checkpoint names it; by folder name otherwise.
    found = [checkpoint for folder in stages.values() if (checkpoint := latest_checkpoint(folder)) is not None]
    found.sort(key=lambda checkpoint: (checkpoint.meta.get("stage_index", 0), checkpoint.folder.parent.parent.name))
    finished = [checkpoint for checkpoint in found if checkpoint.meta.get("stage_finished", True)]
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
    tensors = read_tensors(folder, f"{role}.backbone.")
    if not tensors:
        raise CheckpointError(f"{folder} holds no '{role}.backbone' weights; it was not written by meddino-pretrain")
    try:
        name = {"name": meta["backbone_name"]} if "backbone_name" in meta else {}
        architecture = check_config(Architecture, {**meta["backbone"], **name}, where=f"{folder}: backbone")
        contract = check_config(InputContract, meta["input_contract"], where=f"{folder}: input_contract")
        lineage = _lineage(meta, str(folder))
        resolutions = tuple(int(size) for size in meta.get("resolutions_px_seen", ()))
    except KeyError as error:
        raise CheckpointError(f"{folder / META_FILE} has no {error}; it was not written by meddino-pretrain") from error
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    heads = {head: read_tensors(folder, f"{role}.{head}.") for head in HEADS}
    heads = {head: weights for head, weights in heads.items() if weights}
    return ExportSource(tensors, heads, architecture, contract, resolutions, lineage, role, {})


def _lineage(meta: Mapping[str, Any], where: str) -> Lineage:
    given = dict(meta.get("lineage") or {})
    given.setdefault("corpus_hash", meta.get("corpus_hash"))
    lineage = check_config(
        Lineage, {key: given[key] for key in given if key in Lineage.model_fields}, where=f"{where}: lineage"
    )
    # Weights derived from somebody's weights stay under that licence.
    return lineage.model_copy(update={"licence": lineage.parent.licence}) if lineage.parent else lineage
