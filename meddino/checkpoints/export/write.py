"""From a run or a training checkpoint to a folder that can be shared, compared with its source before it is called done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from torch import Tensor

from meddino.checkpoints.export import FORMATS
from meddino.checkpoints.export.comparison import check_slices, largest_difference, outputs
from meddino.checkpoints.export.foreign_options import ForeignOptions
from meddino.checkpoints.export.model import Model, assemble, load
from meddino.checkpoints.export.model_card import model_card
from meddino.checkpoints.export.model_folder import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    FileRecord,
    ModelConfig,
    WeightsRecord,
    is_model_folder,
    meddino_version,
    parameter_count,
    write_config,
    write_weights,
)
from meddino.checkpoints.export.source import ExportSource, Role, read_source
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_directory, check_free_space, sha256_file, write_text
from meddino.core.logging import get_logger
from meddino.data.overlap import VOLUMES_FILE

ExportDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[ExportDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADS_FILE = "heads.safetensors"

_log = get_logger(__name__)


def export_model(
    source: Path,
    out: Path,
    formats: Sequence[str] = ("safetensors",),
    *,
    stage: str | None = None,
    role: Role = "teacher",
    dtype: ExportDtype = "fp32",
    heads: bool = False,
    onnx_layers: Sequence[int] = (),
    metrics: Mapping[str, Any] | None = None,
    corpus: Path | str | None = None,
) -> Path:
    """Write a model folder; it appears under its name when everything in it was loaded again and compared.

    Args:
        source: A run, a training checkpoint, or a model folder.
        out: The folder to make; one that is there and is a model folder is replaced.
        formats: "safetensors" is always written; others go beside it.
        stage: Of a run: this stage's last checkpoint instead of the last finished stage's.
        role: "teacher" or "student".
        dtype: Of the weights in our own file.
        heads: Also write the DINO and iBOT heads.
        onnx_layers: Blocks whose patch maps the ONNX model gives besides, from 0.
        metrics: Figures for config.json and the card.
        corpus: Compare on slices of this corpus instead of made ones.

    Returns:
        `out`.

    Raises:
        CheckpointError: If the source cannot be used, or what was written does not compute the same; `out` is then as
            it was before.
    """
    unknown = [name for name in formats if name != "safetensors" and name not in FORMATS]
    if unknown:
        raise CheckpointError(f"unknown export formats {unknown}; allowed: {', '.join(['safetensors', *FORMATS])}")
    _check_replaced(out, formats, heads)
    found = _in_dtype(read_source(source, stage, role), dtype)
    if heads and not found.heads:
        raise CheckpointError(f"{source} holds no heads to export; leave --heads away")
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in found.tensors.values())
    check_free_space(out.parent, (1 + len(formats)) * size + (16 << 20), "the export")
    command = _command(formats, stage, role, dtype, heads, onnx_layers)
    with atomic_directory(out) as partial:
        config = _write_own(partial, found, heads, {**found.metrics, **(metrics or {})}, command)
        expected = assemble(config, found.tensors, where=str(source))
        slices = check_slices(expected.patch_size, corpus, expected.contract.modality)
        _check_own(partial, expected, slices)
        options = ForeignOptions(slices, DTYPES[dtype], tuple(onnx_layers))
        for name in formats:
            if name != "safetensors":
                (partial / name).mkdir()
                resolve_name(FORMATS[name])(partial / name, expected, options)
    _log.info("exported %s (%s parameters) to %s", config.architecture.name, f"{config.weights.parameters:,}", out)
    return out


def _write_own(folder: Path, found: ExportSource, heads: bool, metrics: dict[str, Any], command: str) -> ModelConfig:
    """Write what every export holds: weights, config, card, and the list of volumes if there is one."""
    record = FileRecord(
        architecture=found.architecture, input_contract=found.contract, role=found.role, licence=found.lineage.licence
    )
    write_weights(folder / WEIGHTS_FILE, found.tensors, record)
    if heads:
        flat = {f"{head}.{name}": value for head, part in found.heads.items() for name, value in part.items()}
        write_weights(folder / HEADS_FILE, flat)
    config = _config(found, sha256_file(folder / WEIGHTS_FILE), metrics, command)
    write_config(folder, config)
    write_text(folder / CARD_FILE, model_card(config))
    if found.volumes is not None:
        write_text(folder / VOLUMES_FILE, found.volumes)
    return config


def _check_own(folder: Path, expected: Model, slices: Sequence[Tensor]) -> None:
    loaded = load(folder)
    for stored in slices:
        difference = largest_difference(outputs(expected, stored), outputs(loaded, stored))
        if difference != 0:
            raise CheckpointError(
                f"the export does not compute what its source does: outputs differ by {difference:.2e} at "
                f"{list(stored.shape[-2:])} px; nothing was written, run the command again and check the disk if it repeats"
            )


def _in_dtype(source: ExportSource, dtype: ExportDtype) -> ExportSource:
    target = DTYPES[dtype]

    def convert(name: str, tensor: Tensor) -> Tensor:
        # The rotary periods keep their precision: they are 16 numbers, and angles depend on them.
        if not tensor.is_floating_point() or name.endswith("rope_embed.periods"):
            return tensor
        converted = tensor.to(target)
        if not torch.isfinite(converted).all():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"tensor {name} holds NaN or infinity: training broke down; export an earlier checkpoint")
            largest = tensor.abs().max().item()
            raise CheckpointError(
                f"tensor {name} does not fit into {dtype} (largest magnitude {largest:g}); export with --dtype bf16 or fp32"
            )
        return converted

    return replace(
        source,
        tensors={name: convert(name, tensor) for name, tensor in source.tensors.items()},
        heads={head: {name: convert(name, tensor) for name, tensor in part.items()} for head, part in source.heads.items()},
    )


def _config(source: ExportSource, sha256: str, metrics: dict[str, Any], command: str) -> ModelConfig:
    weights_alone = (tensor for name, tensor in source.tensors.items() if not name.endswith("rope_embed.periods"))
    kinds = {tensor.dtype for tensor in weights_alone if tensor.is_floating_point()}
    dtype = str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    weights = {"sha256": sha256, "dtype": dtype, "parameters": parameter_count(source.tensors), "role": source.role}
    return ModelConfig(
        architecture=source.architecture,
        input_contract=source.contract,
        resolutions_px_seen=source.resolutions_px_seen,
        lineage=source.lineage if source.volumes is not None else source.lineage.model_copy(update={"training_volumes": None}),
        weights=WeightsRecord.model_validate(weights),
        metrics=metrics,
        command=command,
        meddino_version=meddino_version(),
    )


def _command(
    formats: Sequence[str], stage: str | None, role: Role, dtype: ExportDtype, heads: bool, layers: Sequence[int]
) -> str:
    # Without paths: they say nothing to a reader elsewhere, and equal models shall give equal bytes.
    words = ["meddino-export RUN_OR_CHECKPOINT --out MODEL --to", ",".join(formats)]
    words += ["--stage", stage] if stage else []
    words += ["--network", role] if role != "teacher" else []
    words += ["--dtype", dtype] if dtype != "fp32" else []
    words += ["--onnx-layers", ",".join(map(str, layers))] if layers else []
    return " ".join([*words, *(["--heads"] if heads else [])])


def _check_replaced(out: Path, formats: Sequence[str], heads: bool) -> None:
    """Refuse a folder that holds more than an export of ours, and tell what of an earlier export is not written again."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a folder's name for the export")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    own = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, VOLUMES_FILE, HEADS_FILE, *FORMATS}
    others = [name for name in held if name not in own] if is_model_folder(out) else held
    if others:
        raise CheckpointError(
            f"{out} holds other things than an exported model ({others[0]}) and will not be replaced; choose another folder"
        )
    lost = [name for name in held if name in FORMATS and name not in formats]
    lost += [HEADS_FILE] if HEADS_FILE in held and not heads else []
    if lost:
        _log.warning("%s is replaced whole: %s of the export before is not written again", out, ", ".join(lost))
