"""Who trains, who selects, who is tested: patient-disjoint, seeded, independent of directory order, and kept in a file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.model_selection import KFold

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed
from meddino_evaluation.data.dataset import Case, LabelledDataset

SPLITS_FILE = "splits_final.json"
NNUNET_SEED = 12345


@dataclass(frozen=True)
class Split:
    """One fold.

    Attributes:
        fold: Its number.
        train: Names of the cases that are trained on.
        val: Names of the cases that hyper-parameters are selected on; may be empty where nothing is selected.
        test: Names of the cases that are read once, in the last phase.
    """

    fold: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(cases: Sequence[Case], count: int, seed: int = NNUNET_SEED) -> list[dict[str, list[str]]]:
    """Divide patients into folds as nnU-Net does.

    Args:
        cases: In any order.
        count: Number of folds.
        seed: 12345 gives nnU-Net's own splits_final.json where every case is its own patient.

    Returns:
        For each fold {"train": case names, "val": case names}, sorted.

    Raises:
        ConfigError: There are fewer patients than folds.
    """
    patients = sorted({case.patient for case in cases})
    if count < 2 or count > len(patients):
        raise ConfigError(f"splits.folds is {count}; {len(patients)} patients allow 2 to {len(patients)} folds")
    folds = []
    for _, held_out in KFold(n_splits=count, shuffle=True, random_state=seed).split(patients):
        names = {patients[index] for index in held_out}
        folds.append(
            {
                "train": sorted(case.name for case in cases if case.patient not in names),
                "val": sorted(case.name for case in cases if case.patient in names),
            }
        )
    return folds


def read_folds(path: Path, cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    """Read a splits_final.json.

    Raises:
        ConfigError: It is no list of {"train", "val"}, or names a case that is not in the data set.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    known = {case.name for case in cases}
    if not isinstance(content, list) or not all(_is_fold(fold) for fold in content):
        raise ConfigError(f"{path}: expected a list of objects with the lists 'train' and 'val'")
    for number, fold in enumerate(content):
        strange = sorted({*fold["train"], *fold["val"]} - known)
        if strange:
            raise ConfigError(f"{path}: fold {number} names {strange[:5]}, which the data set does not have")
    return [{"train": sorted(fold["train"]), "val": sorted(fold["val"])} for fold in content]


def choose_split(
    dataset: LabelledDataset, folds: Sequence[dict[str, list[str]]], fold: int, val_fraction: float, seed: int
) -> Split:
    """Turn a fold into train, val and test.

    With a test part of its own (imagesTs) the fold's held-out part selects and that part is the test. Without one, the
    fold's held-out part is the test, and the cases to select on are held out of the training part, by patient.

    Args:
        dataset: Gives cases and patients.
        folds: As from `make_folds` or `read_folds`.
        fold: Number of the fold.
        val_fraction: Share of training patients that selection holds out; 0 where nothing is selected.
        seed: Draws them.

    Raises:
        ConfigError: A part is empty, or a patient or file is in two parts.
    """
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold {fold} does not exist; this data set is divided into folds 0 to {len(folds) - 1}")
    train, held_out = folds[fold]["train"], folds[fold]["val"]
    patient = {case.name: case.patient for case in (*dataset.cases, *dataset.test_cases)}
    if dataset.test_cases:
        split = Split(fold, tuple(train), tuple(held_out), tuple(case.name for case in dataset.test_cases))
    else:
        patients = sorted({patient[name] for name in train}, key=lambda name: derive_seed(seed, "val", fold, name))
        chosen = set(patients[: math.ceil(val_fraction * len(patients))])
        val = tuple(name for name in train if patient[name] in chosen)
        split = Split(fold, tuple(name for name in train if patient[name] not in chosen), val, tuple(held_out))
    check_split(split, dataset)
    return split


def check_split(split: Split, dataset: LabelledDataset) -> None:
    """Refuse an empty part, and patients or image files that are in two parts.

    Raises:
        ConfigError: With the names.
    """
    for part, names in (("train", split.train), ("test", split.test)):
        if not names:
            raise ConfigError(
                f"fold {split.fold}: its {part} part is empty (train {len(split.train)}, val {len(split.val)}, test "
                f"{len(split.test)} cases); use fewer folds, a smaller splits.val_fraction or more cases"
            )
    parts = {part: [dataset.case(name) for name in getattr(split, part)] for part in ("train", "val", "test")}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = {case.patient for case in parts[first]} & {case.patient for case in parts[second]}
        if shared:
            raise ConfigError(
                f"fold {split.fold}: patients {sorted(shared)[:5]} are in {first} and in {second}; splits go by patient"
            )
        files = {dataset.file_hash(path): case.name for case in parts[first] for path in case.images}
        for case in parts[second]:
            twin = next((files[dataset.file_hash(path)] for path in case.images if dataset.file_hash(path) in files), None)
            if twin is not None:
                raise ConfigError(f"fold {split.fold}: case '{case.name}' in {second} is the same image as '{twin}' in {first}")


def few_cases(train: Sequence[str], dataset: LabelledDataset, count: int | None, fraction: float, seed: int) -> tuple[str, ...]:
    """Choose some training patients, nested: the first two of seed 0 are among its first five.

    Args:
        train: Case names.
        dataset: Gives patients.
        count: Number of patients, or None for all.
        fraction: Share of patients (at least one); applied where `count` is None.
        seed: Draws them.
    """
    patients = sorted({dataset.case(name).patient for name in train}, key=lambda name: derive_seed(seed, "few", name))
    wanted = max(1, round(fraction * len(patients))) if count is None else count
    if wanted > len(patients):
        raise ConfigError(f"labels.train_cases is {wanted}, but this fold has {len(patients)} training patients")
    chosen = set(patients[:wanted])
    return tuple(name for name in train if dataset.case(name).patient in chosen)


def _is_fold(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(part), list) and all(isinstance(name, str) for name in value[part]) for part in ("train", "val")
    )
