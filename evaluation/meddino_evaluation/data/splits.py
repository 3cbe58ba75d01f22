"""Who trains, who selects, who is tested: by patient, seeded, independent of directory order, from files or drawn.

Segmentation divides patients into folds as nnU-Net does; classification draws parts that keep the classes' shares, or
completes the split that the publishers gave. What is true of a split is checked in one place for both.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.core.seeds import derive_seed
from meddino_evaluation.data.case import Case, ClassCase, a_few

PARTS = ("train", "val", "test")
SPLITS_FILE = "splits_final.json"
NNUNET_SEED = 12345
Folds = Sequence[Mapping[str, Sequence[str]]]
CaseT = TypeVar("CaseT")
PartT = TypeVar("PartT")
_ATTEMPTS = 200
_FEW = 5


@dataclass(frozen=True)
class Split:
    """Names of the cases of the three parts.

    Attributes:
        number: Of the fold or repeat.
        train: What is learned from.
        val: What is selected on; may be empty where nothing is selected.
        test: What is read once, in the last phase.
        origin: How it came about, in words.
    """

    number: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    origin: str = ""

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the three parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


class SealedTest(Generic[CaseT, PartT]):
    """The test part: it can be opened once, after everything has been learned."""

    def __init__(self, cases: Sequence[CaseT], read: Callable[[Sequence[CaseT]], PartT]) -> None:
        self._cases = tuple(cases)
        self._read = read
        self._opened = False

    def open(self) -> PartT:
        """Read the test cases.

        Raises:
            RuntimeError: They were read before: a fault of this program, never the user's.
        """
        if self._opened:
            raise RuntimeError("the test part was to be read a second time")
        self._opened = True
        return self._read(self._cases)


def check_split(cases: Sequence[Case[Any]], split: Split, where: str, *, needed: Sequence[str] = PARTS) -> None:
    """Refuse a split with a patient on two sides, an unknown name, or an empty part.

    Raises:
        ConfigError: Names the patients, cases or parts.
    """
    patient = {case.name: case.patient for case in cases}
    unknown = [name for names in split.parts().values() for name in names if name not in patient]
    if unknown:
        raise ConfigError(f"{where}: the split names {unknown[:_FEW]}, which the data set does not have")
    empty = [part for part in needed if not split.parts()[part]]
    if empty:
        counts = ", ".join(f"{part} {len(names)}" for part, names in split.parts().items())
        raise ConfigError(
            f"{where}: its {' and '.join(empty)} part is empty ({counts} cases); use fewer folds, other fractions or more cases"
        )
    sides: dict[str, list[str]] = defaultdict(list)
    for part, names in split.parts().items():
        for one in sorted({patient[name] for name in names}):
            sides[one].append(part)
    shared = [f"{one} ({' and '.join(found)})" for one, found in sides.items() if len(found) > 1]
    if shared:
        raise ConfigError(
            f"{where}: {len(shared)} patients are in two parts: {', '.join(shared[:_FEW])}; a patient belongs to one side only"
        )


def check_twins(split: Split, hashes: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuse a split whose parts hold the same image under two names.

    Args:
        split: The split.
        hashes: For each case those of its files or slices.
        where: For the message.

    Raises:
        ConfigError: Names both cases.
    """
    seen: dict[str, tuple[str, str]] = {}
    for part, names in split.parts().items():
        for name in names:
            for one in hashes[name]:
                other_part, other = seen.setdefault(one, (part, name))
                if other_part != part:
                    raise ConfigError(
                        f"{where}: case '{name}' in {part} is the same image as '{other}' in {other_part}; "
                        "remove one of them or put both on one side"
                    )


def left_out(cases: Sequence[Case[Any]], splits: Sequence[Split]) -> str:
    """Say how many cases are in no part of any split, for the log and the notes of a report; "" if all are in one."""
    used = {name for split in splits for names in split.parts().values() for name in names}
    lost = [case.name for case in cases if case.name not in used]
    return f"{len(lost)} of {len(cases)} cases are in no part of the split and are left out: {a_few(lost)}" if lost else ""


def of_folds(folds: Folds) -> list[Split]:
    """Return folds as splits whose held-out part is the test."""
    return [Split(number, tuple(fold["train"]), (), tuple(fold["val"])) for number, fold in enumerate(folds)]


def make_folds(cases: Sequence[Case[Any]], count: int, seed: int = NNUNET_SEED) -> list[dict[str, list[str]]]:
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
    from sklearn.model_selection import KFold

    patients = sorted({case.patient for case in cases})
    if count < 2 or count > len(patients):
        raise ConfigError(f"splits.folds is {count}; {len(patients)} patients allow 2 to {len(patients)} folds")
    folds = []
    for _, held_out in KFold(n_splits=count, shuffle=True, random_state=seed).split(patients):
        names = {patients[index] for index in held_out}
        sides: dict[str, list[str]] = {"train": [], "val": []}
        for case in sorted(cases, key=lambda one: one.name):
            sides["val" if case.patient in names else "train"].append(case.name)
        folds.append(sides)
    return folds


def read_folds(path: Path) -> list[dict[str, list[str]]]:
    """Read a splits_final.json.

    Raises:
        ConfigError: It is no list of {"train", "val"}, or a fold names a case twice or brings a list that is not read.
    """
    content = _read_json(path)
    try:
        folds = [{part: sorted(_names(fold[part])) for part in ("train", "val")} for fold in content]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected a list of objects with the lists 'train' and 'val'") from error
    for number, (given, fold) in enumerate(zip(content, folds, strict=True)):
        if others := sorted(set(given) - set(fold)):
            raise ConfigError(
                f"{path}: fold {number} has the list '{others[0]}', which is not read: tested is 'val', or imagesTs; remove it"
            )
        if twice := sorted(name for name, times in Counter(fold["train"] + fold["val"]).items() if times > 1):
            raise ConfigError(f"{path}: fold {number} names {twice[:5]} twice; a case is in 'train' or in 'val', once")
    return folds


def choose_split(
    cases: Sequence[Case[Any]], test_cases: Sequence[Case[Any]], folds: Folds, fold: int, val_fraction: float, seed: int
) -> Split:
    """Turn a fold into train, val and test.

    With a test part of its own (imagesTs) the fold's held-out part selects and that part is the test. Without one, the
    fold's held-out part is the test, and the cases to select on are held out of the training part, by patient.

    Args:
        cases: Of the folds.
        test_cases: The data set's own test part, or empty.
        folds: As from `make_folds` or `read_folds`.
        fold: Number of the fold.
        val_fraction: Share of training patients that selection holds out; 0 where nothing is selected.
        seed: Draws them.

    Raises:
        ConfigError: There is no such fold, a part is empty, or a patient is in two parts.
    """
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold {fold} does not exist; this data set is divided into folds 0 to {len(folds) - 1}")
    train, held_out = tuple(folds[fold]["train"]), tuple(folds[fold]["val"])
    where = f"fold {fold}"
    check_split(cases, Split(fold, train, (), held_out), where, needed=("train",))
    if test_cases:
        split = Split(fold, train, held_out, tuple(case.name for case in test_cases))
    else:
        patient = {case.name: case.patient for case in cases}
        patients = sorted({patient[name] for name in train}, key=lambda name: derive_seed(seed, "val", fold, name))
        chosen = set(patients[: math.ceil(val_fraction * len(patients))])
        val = tuple(name for name in train if patient[name] in chosen)
        split = Split(fold, tuple(name for name in train if patient[name] not in chosen), val, held_out)
    check_split([*cases, *test_cases], split, where, needed=("train", "test"))
    return split


def few_cases(
    train: Sequence[str], cases: Sequence[Case[Any]], count: int | None, fraction: float, seed: int
) -> tuple[str, ...]:
    """Choose some training patients, nested: the first two of seed 0 are among its first five.

    Args:
        train: Case names.
        cases: Give patients.
        count: Number of patients, or None for all.
        fraction: Share of patients (at least one); applied where `count` is None.
        seed: Draws them.
    """
    patient = {case.name: case.patient for case in cases}
    patients = sorted({patient[name] for name in train}, key=lambda name: derive_seed(seed, "few", name))
    wanted = max(1, round(fraction * len(patients))) if count is None else count
    if wanted > len(patients):
        raise ConfigError(f"labels.train_cases is {wanted}, but this fold has {len(patients)} training patients")
    chosen = set(patients[:wanted])
    return tuple(name for name in train if patient[name] in chosen)


def draw_splits(
    cases: Sequence[ClassCase], where: str, *, repeats: int, val_fraction: float, test_fraction: float, seed: int
) -> list[Split]:
    """Split a classification set by patient; the result depends on names, labels and the seed only.

    Parts that the publishers gave stay as they are; a missing validation part is held out from train by patient, never from
    test. Without a given test part each repeat draws its own; with all parts given repeats change the seed of training only.

    Args:
        cases: With patients and, where the publishers split, their parts.
        where: For messages.
        repeats: How many splits.
        val_fraction: Share of the patients (of train, if test was given) held out for validation.
        test_fraction: Share of the patients held out for the test.
        seed: Of the draws.

    Raises:
        ConfigError: A patient stands in two given parts, or too few patients; names them.
    """
    given = any(case.split for case in cases)
    splits = []
    for repeat in range(repeats):
        if given:
            split = _complete(cases, val_fraction, test_fraction, seed, repeat)
        else:
            split = _draw(cases, where, val_fraction, test_fraction, seed, repeat)
        check_split(cases, split, where)
        splits.append(split)
    return splits


def save_split(path: Path, dataset: str, split: Split) -> None:
    """Write a split as a file that `load_split` reads."""
    parts = {part: list(names) for part, names in split.parts().items()}
    write_json(path, {"dataset": dataset, "repeat": split.number, "origin": split.origin, **parts})


def load_split(path: Path, cases: Sequence[Case[Any]], where: str, number: int = 0) -> Split:
    """Read a split file (JSON with train, val and test: lists of case names) and check it.

    Raises:
        ConfigError: The file is missing or no such file, or the split is refused by `check_split`.
    """
    content = _read_json(path)
    try:
        parts = [tuple(_names(content[part])) for part in PARTS]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"split file {path} must be JSON with lists train, val and test") from error
    split = Split(number, parts[0], parts[1], parts[2], f"file {path}")
    check_split(cases, split, where)
    return split


def absent_classes(cases: Sequence[ClassCase], classes: int) -> list[int]:
    """Return the classes (or labels) of which the cases hold none."""
    present = {label for case in cases for label in _present(case)}
    return [label for label in range(classes) if label not in present]


def _present(case: ClassCase) -> list[int]:
    return [case.label] if isinstance(case.label, int) else np.flatnonzero(np.array(case.label) == 1).tolist()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _names(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise TypeError("no list of names")
    return values


def _patients(cases: Sequence[ClassCase]) -> dict[str, list[ClassCase]]:
    groups: dict[str, list[ClassCase]] = defaultdict(list)
    for case in cases:
        groups[case.patient].append(case)
    return groups


def _stratum(cases: Sequence[ClassCase]) -> str:
    """The label that most of a patient's cases have; for multi-label whether anything is positive."""
    labels = [str(case.label) if isinstance(case.label, int) else str(1 in case.label) for case in cases]
    return sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0][0]


def _hold_out(
    groups: Mapping[str, list[ClassCase]], fraction: float, seed: int, *position: int | str
) -> tuple[list[ClassCase], list[ClassCase]]:
    """Return the cases of patients kept and held out, these spread over strata in proportion (largest remainder)."""
    strata: dict[str, list[str]] = defaultdict(list)
    # By a hash of the name: independent of folder order, and adding a patient moves no other.
    for patient in sorted(groups, key=lambda one: derive_seed(seed, "split", *position, one)):
        strata[_stratum(groups[patient])].append(patient)
    wanted = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    shares = {name: wanted * len(members) / len(groups) for name, members in strata.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda one: (counts[one] - shares[one], derive_seed(seed, "stratum", *position, one))):
        if sum(counts.values()) < wanted and counts[name] < len(strata[name]):
            counts[name] += 1
    held = [patient for name, members in strata.items() for patient in members[: counts[name]]]
    kept = [patient for patient in groups if patient not in set(held)]
    return [case for one in kept for case in groups[one]], [case for one in held for case in groups[one]]


def _draw(cases: Sequence[ClassCase], where: str, val_fraction: float, test_fraction: float, seed: int, repeat: int) -> Split:
    groups = _patients(cases)
    if len(groups) < len(PARTS):
        raise ConfigError(f"{where} has {len(groups)} patients; train, val and test need three at least")
    labels = {label for case in cases for label in _present(case)}
    for attempt in range(_ATTEMPTS):
        rest, test = _hold_out(groups, test_fraction, seed, repeat, attempt, "test")
        train, val = _hold_out(_patients(rest), val_fraction / (1 - test_fraction), seed, repeat, attempt, "val")
        parts = [tuple(sorted(case.name for case in part)) for part in (train, val, test)]
        split = Split(repeat, parts[0], parts[1], parts[2], f"repeat {repeat}: drawn by patient, seed {seed}, draw {attempt}")
        if labels <= {label for case in train for label in _present(case)}:
            break
    return split  # whether train lacks a class is for the caller to judge, who knows their names


def _complete(cases: Sequence[ClassCase], val_fraction: float, test_fraction: float, seed: int, repeat: int) -> Split:
    """Fill in what the publishers' split lacks; cases without a part are left out."""
    given: dict[str, list[ClassCase]] = {part: [case for case in cases if case.split == part] for part in PARTS}
    origin = "publishers' split"
    if not given["test"]:
        # What is published as validation without a test (CheXpert) is the only clean held-out part: it becomes the test.
        given["test"], given["val"] = given["val"], []
        origin += ", its validation part is the test"
    if not given["test"]:
        given["train"], given["test"] = _hold_out(_patients(given["train"]), test_fraction, seed, repeat, "test")
        origin += f", test held out from train by patient, seed {seed}"
    if not given["val"]:
        given["train"], given["val"] = _hold_out(_patients(given["train"]), val_fraction, seed, repeat, "val")
        origin += f", validation held out from train by patient, seed {seed}"
    lost = sum(case.split not in PARTS for case in cases)
    if lost:
        origin += f", {lost} cases without a part are left out"
    if "seed" in origin:
        origin = f"repeat {repeat}: {origin}"
    names = [tuple(case.name for case in given[part]) for part in PARTS]
    return Split(repeat, names[0], names[1], names[2], origin)
