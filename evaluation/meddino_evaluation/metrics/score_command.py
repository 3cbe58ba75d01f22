"""`meddino-eval score`: any folder of label maps against references."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import meddino
from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import sha256_file, write_json
from meddino.core.logging import get_logger
from meddino.volumes.read import read_label_map
from meddino_evaluation.data.dataset import check_same_grid
from meddino_evaluation.data.labels import LabelScheme, parse_labels
from meddino_evaluation.metrics.label_metrics import METRICS, score_case
from meddino_evaluation.metrics.tables import summarise, write_cases

ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
EMPTY_RULE = "both empty: left out; one empty: Dice, IoU and NSD are 0, distances are left out"

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval score`."""
    parser.add_argument("--pred", required=True, type=Path, help="folder of predicted label maps")
    parser.add_argument("--ref", required=True, type=Path, help="folder of reference label maps of the same names")
    parser.add_argument("--out", required=True, type=Path, help="folder for cases.csv and metrics.json")
    parser.add_argument("--tolerance-mm", type=float, default=1.0, help="of the normalised surface Dice")
    parser.add_argument(
        "--dataset-json", type=Path, help="names, regions and the ignore label; else found beside --ref, or none"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval score`."""
    if not arguments.tolerance_mm > 0 or not math.isfinite(arguments.tolerance_mm):
        raise ConfigError(f"--tolerance-mm {arguments.tolerance_mm}: must be a positive number of millimetres")
    metrics = score_folders(arguments.pred, arguments.ref, arguments.out, arguments.tolerance_mm, arguments.dataset_json)
    for name, part in metrics["test"]["by_label"].items():
        sys.stdout.write(
            f"{name}: Dice {_text(part['dice']['mean'])}, NSD {_text(part['nsd']['mean'])} ({part['cases']} cases)\n"
        )
    sys.stdout.write(f"all: Dice {_text(metrics['test']['dice']['mean'])} ({metrics['test']['cases']} cases)\n")


def score_folders(pred: Path, ref: Path, out: Path, tolerance_mm: float, dataset_json: Path | None = None) -> dict[str, Any]:
    """Score every reference; a prediction that is missing or unreadable is named, and the others are scored.

    Args:
        pred: Folder of predictions.
        ref: Folder of references.
        out: Folder for the results.
        tolerance_mm: Of the normalised surface Dice.
        dataset_json: Gives the label scheme; None looks in and above `ref`; without one each value is a label.

    Returns:
        The content of metrics.json.

    Raises:
        ConfigError: A folder is missing or empty, or no case could be scored.
    """
    references, predictions = _label_maps(ref, "--ref"), _label_maps(pred, "--pred")
    scheme = _scheme(ref, dataset_json, list(references.values()))
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for case, path in references.items():
        try:
            rows += _score(case, predictions.get(case), path, scheme, tolerance_mm)
        except VolumeError as error:
            logger.warning("%s", error)
            failed[case] = str(error)
    if not rows:
        raise ConfigError(f"no case of {ref} could be scored: {next(iter(failed.values()))}")
    write_cases(out / "cases.csv", rows, ("case", "label", *METRICS))
    metrics = {
        "format": "meddino-scores",
        "version": meddino.__version__,
        "data": {"pred_hash": _hash(predictions), "ref_hash": _hash(references), "labels": list(scheme.names)},
        "config": {"tolerance_mm": tolerance_mm},
        "rule_for_empty_labels": EMPTY_RULE,
        "failed": failed,
        "without_reference": sorted(predictions.keys() - references.keys()),
        "test": summarise([{**row, "seed": 0, "site": "", "patient": row["case"]} for row in rows], 2000),
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def _score(case: str, pred: Path | None, ref: Path, scheme: LabelScheme, tolerance_mm: float) -> list[dict[str, Any]]:
    if pred is None:
        raise VolumeError(f"case {case}: there is no prediction of it")
    reference, grid = read_label_map(ref)
    predicted, own_grid = read_label_map(pred)
    check_same_grid(grid, own_grid, case, pred)
    counted = scheme.check(reference, str(ref))
    strange = sorted(set(np.unique(predicted).tolist()) - scheme.allowed)
    if strange:
        raise VolumeError(f"{pred}: label values {strange[:8]} are not among those of the reference {sorted(scheme.allowed)}")
    return [row.values() for row in score_case(case, predicted, counted, scheme, grid.spacing_mm, tolerance_mm)]


def _label_maps(folder: Path, option: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"{option} {folder}: no such folder")
    found = {path.name.removesuffix(ending): path for ending in reversed(ENDINGS) for path in sorted(folder.glob(f"*{ending}"))}
    if not found:
        raise ConfigError(f"{option} {folder} holds no label map ({', '.join(ENDINGS)})")
    return dict(sorted(found.items()))


def _scheme(ref: Path, dataset_json: Path | None, references: Sequence[Path]) -> LabelScheme:
    candidates = [dataset_json] if dataset_json else [ref / "dataset.json", ref.parent / "dataset.json"]
    for path in candidates:
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is no valid JSON: {error}") from error
            if not isinstance(content, dict):
                raise ConfigError(f"{path}: expected an object, found {type(content).__name__}")
            return parse_labels(content.get("labels"), content.get("regions_class_order"), str(path))
    if dataset_json:
        raise ConfigError(f"--dataset-json {dataset_json}: no such file")
    values: set[int] = set()
    for path in references:
        try:
            values |= set(np.unique(read_label_map(path)[0]).tolist())
        except VolumeError:
            continue  # it is named when its case is scored
    labels = sorted(values - {0})
    if not labels or labels[0] < 0:
        raise ConfigError(f"the references in {ref} hold the label values {sorted(values)}; expected some above 0")
    return LabelScheme(tuple(str(value) for value in labels), tuple((value,) for value in labels))


def _hash(paths: dict[str, Path]) -> dict[str, str]:
    return {case: sha256_file(path) for case, path in paths.items()}


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
