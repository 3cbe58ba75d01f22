"""`meddino-eval score`: any folder of label maps against references."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import meddino
from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import sha256_file, write_json
from meddino.core.logging import get_logger
from meddino.volumes.read import read_label_map
from meddino_evaluation.data.dataset import check_same_grid, in_orientation_of
from meddino_evaluation.data.inputs import ENDINGS, one_file_a_case, stem
from meddino_evaluation.data.labels import LabelScheme, parse_labels
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.metrics.label_metrics import METRICS, score_case
from meddino_evaluation.metrics.tables import summarise, write_cases

RESULTS = ("cases.csv", "metrics.json")
EMPTY_RULE = "both empty: left out; one empty: Dice, IoU and NSD are 0, distances are left out"

logger = get_logger(__name__)


class ScoreConfig(StrictConfig):
    """How label maps are compared."""

    tolerance_mm: float = 1.0
    """Of the normalised surface Dice."""
    missing: Literal["empty", "skip"] = "empty"
    """A reference without a prediction is compared with an empty one, or left out."""
    dataset_json: Path | None = None
    """Gives the label scheme; null looks in and above the references, and without one each value is a label."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval score`."""
    parser.add_argument("--pred", required=True, type=Path, help="folder of predicted label maps")
    parser.add_argument("--ref", required=True, type=Path, help="folder of reference label maps of the same names")
    parser.add_argument("--out", required=True, type=Path, help="folder for config.yaml, cases.csv and metrics.json")
    parser.add_argument(
        "--missing",
        choices=("empty", "skip"),
        default="empty",
        help="what a reference without a prediction counts as: nothing was found, or not at all",
    )
    parser.add_argument("--tolerance-mm", type=float, default=1.0, help="of the normalised surface Dice")
    parser.add_argument(
        "--dataset-json", type=Path, help="names, regions and the ignore label; else found beside --ref, or none"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval score`."""
    if not arguments.tolerance_mm > 0 or not math.isfinite(arguments.tolerance_mm):
        raise ConfigError(f"--tolerance-mm {arguments.tolerance_mm}: must be a positive number of millimetres")
    config = ScoreConfig(tolerance_mm=arguments.tolerance_mm, missing=arguments.missing, dataset_json=arguments.dataset_json)
    metrics = score_folders(arguments.pred, arguments.ref, arguments.out, config)
    for name, part in metrics["test"]["by_label"].items():
        sys.stdout.write(
            f"{name}: Dice {_text(part['dice']['mean'])}, NSD {_text(part['nsd']['mean'])} ({part['cases']} cases)\n"
        )
    counted = metrics["counted"]
    sys.stdout.write(f"all: Dice {_text(metrics['test']['dice']['mean'])} ({_counted_text(counted)})\n")
    failed = metrics["failed"]
    if failed:
        raise VolumeError(
            f"{len(failed)} of {counted['references']} cases could not be scored and are in no mean: {', '.join(failed)}; "
            f"why stands in {arguments.out / 'metrics.json'}"
        )


def score_folders(pred: Path, ref: Path, out: Path, config: ScoreConfig) -> dict[str, Any]:
    """Score every reference; a case that is unreadable or lies on another grid is named, and the others are scored.

    Args:
        pred: Folder of predictions.
        ref: Folder of references.
        out: Folder for the results.
        config: How they are compared.

    Returns:
        The content of metrics.json. A label that only predictions hold is a label of its own: false positives. A reference with
        a value that nothing declares is not scored, as it would not be trained on.

    Raises:
        ConfigError: A folder is missing or empty, two files mean one case, no case could be scored, or `out` holds somebody
            else's files.
    """
    refuse_files_of_others(out, RESULTS)
    references, predictions = _label_maps(ref, "--ref"), _label_maps(pred, "--pred")
    declared = _scheme(ref, config.dataset_json, list(references.values()))
    scheme = _with_invented(declared, references, predictions)
    write_settings(out, config)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    notes: dict[str, str] = {}
    without = sorted(references.keys() - predictions.keys())
    for case, path in references.items():
        if case in without and config.missing == "skip":
            continue
        try:
            rows += _score(case, predictions.get(case), path, declared, scheme, config.tolerance_mm, notes)
        except VolumeError as error:
            logger.warning("%s", error)
            failed[case] = str(error)
    if not rows:
        raise ConfigError(f"no case of {ref} could be scored: {next(iter(failed.values()), 'there is no prediction')}")
    surplus = sorted(predictions.keys() - references.keys())
    _tell_of_single_ones(without, surplus, config.missing)
    write_cases(out / "cases.csv", rows, ("case", "label", *METRICS))
    metrics = {
        "format": "meddino-scores",
        "version": meddino.__version__,
        "data": {"pred_hash": _hash(predictions), "ref_hash": _hash(references), "labels": list(scheme.names)},
        "config": config.model_dump(mode="json"),
        "rule_for_empty_labels": EMPTY_RULE,
        "counted": {
            "references": len(references),
            "scored": len({row["case"] for row in rows}),
            "missing": without,
            "missing_count_as": config.missing,
            "failed": len(failed),
        },
        "failed": failed,
        "notes": notes,
        "without_reference": surplus,
        "test": summarise([{**row, "seed": 0, "site": "", "patient": row["case"]} for row in rows], 2000),
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def _tell_of_single_ones(without: Sequence[str], surplus: Sequence[str], missing: str) -> None:
    for case in without:
        logger.warning(
            "case %s: there is no prediction of it; %s", case, "left out" if missing == "skip" else "counts as empty"
        )
    if surplus:
        more = " ..." if len(surplus) > 5 else ""
        logger.warning("%d predictions have no reference and are not scored: %s%s", len(surplus), ", ".join(surplus[:5]), more)


def _score(
    case: str,
    pred: Path | None,
    ref: Path,
    declared: LabelScheme,
    scheme: LabelScheme,
    tolerance_mm: float,
    notes: dict[str, str],
) -> list[dict[str, Any]]:
    reference, grid = read_label_map(ref)
    # Not with what predictions invent: a value that both hold and nothing declares would be found to be right.
    counted = declared.check(reference, str(ref))
    if pred is None:
        predicted = np.zeros_like(reference)
    else:
        predicted, own_grid = read_label_map(pred)
        if not grid.matches(own_grid, tolerance_mm=0.1):
            turned = in_orientation_of(predicted, own_grid, grid)
            if turned is None:
                check_same_grid(grid, own_grid, case, pred, "reference", "prediction")
            else:
                notes[case] = "the directions of prediction and reference differ; compared in the reference's orientation"
                logger.warning("case %s: %s", case, notes[case])
                predicted = turned
    return [row.values() for row in score_case(case, predicted, counted, scheme, grid.spacing_mm, tolerance_mm)]


def _label_maps(folder: Path, option: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"{option} {folder}: no such folder")
    maps = [path for path in sorted(folder.iterdir()) if path.name.endswith(ENDINGS) and not path.name.startswith(".")]
    if not maps:
        raise ConfigError(f"{option} {folder} holds no label map ({', '.join(ENDINGS)})")
    return one_file_a_case(f"{option} {folder}", ((stem(path), path) for path in maps), ConfigError)


def _values(paths: Iterable[Path]) -> set[int]:
    values: set[int] = set()
    for path in paths:
        try:
            values |= set(np.unique(read_label_map(path)[0]).tolist())
        except VolumeError:
            continue  # it is named when its case is scored
    return values


def _with_invented(scheme: LabelScheme, references: Mapping[str, Path], predictions: Mapping[str, Path]) -> LabelScheme:
    """Return a scheme with a label of its own for each value that predictions hold and the scheme does not know."""
    invented = sorted(_values(path for case, path in predictions.items() if case in references) - scheme.allowed)
    if not invented:
        return scheme
    logger.warning("predictions hold the label values %s, which no reference can have: false positives", invented[:8])
    names = (*scheme.names, *(f"{value} (invented)" for value in invented))
    return replace(scheme, names=names, values=(*scheme.values, *((value,) for value in invented)))


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
    values = _values(references)
    labels = sorted(values - {0})
    if not labels or labels[0] < 0:
        raise ConfigError(f"the references in {ref} hold the label values {sorted(values)}; expected some above 0")
    return LabelScheme(tuple(str(value) for value in labels), tuple((value,) for value in labels))


def _hash(paths: dict[str, Path]) -> dict[str, str]:
    return {case: sha256_file(path) for case, path in paths.items()}


def _counted_text(counted: Mapping[str, Any]) -> str:
    text = f"over {counted['scored']} of {counted['references']} cases"
    if counted["missing"]:
        text += f"; {len(counted['missing'])} without a prediction " + (
            "count as empty" if counted["missing_count_as"] == "empty" else "left out"
        )
    return text + (f"; {counted['failed']} failed" if counted["failed"] else "")


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
