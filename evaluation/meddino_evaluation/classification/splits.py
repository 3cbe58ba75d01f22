"""Train, validation and test: by patient, from files or from a seed, and never with the same thing on two sides."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.core.seeds import derive_seed
from meddino_evaluation.classification.datasets import Case, LabelledSet

NAMES = ("train", "val", "test")
_ATTEMPTS = 200
_FEW = 5


@dataclass(frozen=True)
class Split:
    """Case ids of the three parts.

    Attributes:
        train: Ids.
        val: Ids; selection happens here.
        test: Ids; read once.
        repeat: Number of the repeat, from 0.
        origin: How it came about, in words.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    repeat: int
    origin: str


def make_splits(dataset: LabelledSet, *, repeats: int, val_fraction: float, test_fraction: float, seed: int) -> list[Split]:
    """Split a data set by patient.

    Splits that the publishers gave stay as they are; a missing validation part is held out from train by patient, never
    from test. Without a given test part each repeat draws its own. The result depends on ids, labels and the seed only.

    Args:
        dataset: Cases with patients.
        repeats: How many splits; with given train, val and test parts there is one split and repeats change the seed.
        val_fraction: Share of the patients (of train, if test was given) held out for validation.
        test_fraction: Share of the patients held out for the test.
        seed: Of the draws.

    Raises:
        ConfigError: A patient stands in two given parts, or too few patients; names them.
    """
    given = {case.split for case in dataset.cases if case.split}
    groups = _patients(dataset.cases)
    splits = []
    for repeat in range(repeats):
        if not given:
            split = _draw(dataset, groups, val_fraction, test_fraction, seed, repeat)
        else:
            split = _complete(dataset, groups, val_fraction, test_fraction, seed, repeat)
        check_split(dataset, split)
        splits.append(split)
    return splits


def check_split(dataset: LabelledSet, split: Split) -> None:
    """Refuse a split with a patient on two sides, an unknown id, or a class that train lacks.

    Raises:
        ConfigError: Names the patients, ids or classes.
    """
    cases = {case.id: case for case in dataset.cases}
    parts = {name: getattr(split, name) for name in NAMES}
    unknown = [name for ids in parts.values() for name in ids if name not in cases]
    if unknown:
        raise ConfigError(f"data set {dataset.config.name}: the split names ids that do not exist: {', '.join(unknown[:_FEW])}")
    owner: dict[str, str] = {}
    shared: dict[str, set[str]] = defaultdict(set)
    for part, ids in parts.items():
        for name in ids:
            patient = cases[name].patient
            if owner.setdefault(patient, part) != part:
                shared[patient] |= {owner[patient], part}
    if shared:
        named = [f"{patient} ({' and '.join(sorted(sides))})" for patient, sides in sorted(shared.items())]
        raise ConfigError(
            f"data set {dataset.config.name}: {len(shared)} patients stand in two splits: {', '.join(named[:_FEW])}; "
            "a patient belongs to one side only"
        )
    empty = [name for name, ids in parts.items() if not ids]
    if empty:
        raise ConfigError(f"data set {dataset.config.name}: the {', '.join(empty)} split is empty; too few patients to split")
    absent = _absent_classes(dataset, [cases[name] for name in split.train])
    if absent:
        raise ConfigError(
            f"data set {dataset.config.name}: no training case of class {', '.join(absent)}; nothing could learn it: "
            "give another split or seed, or leave the class out"
        )


def check_contents(
    dataset: LabelledSet, split: Split, hashes: Mapping[str, Sequence[str]], corpus_hashes: frozenset[str] = frozenset()
) -> list[str]:
    """Find images that stand on two sides, or in the pretraining corpus.

    Args:
        dataset: The data set.
        split: Its split.
        hashes: Content hashes of each case's slices.
        corpus_hashes: Content hashes of the slices that the model was pretrained on.

    Returns:
        One line for each part that overlaps with the corpus, for the report.

    Raises:
        ConfigError: Two sides hold the same image: names both.
    """
    seen: dict[str, tuple[str, str]] = {}
    for part in NAMES:
        for name in getattr(split, part):
            for one in hashes[name]:
                other = seen.setdefault(one, (part, name))
                if other[0] != part:
                    raise ConfigError(
                        f"data set {dataset.config.name}: {other[1]} ({other[0]}) and {name} ({part}) hold the same image; "
                        "remove one of them or put both on one side"
                    )
    inside = {part: [name for name in getattr(split, part) if corpus_hashes.intersection(hashes[name])] for part in NAMES}
    return [
        f"{len(names)} of {len(getattr(split, part))} {part} cases were seen (without labels) in pretraining: "
        + ", ".join(names[:3])
        for part, names in inside.items()
        if names
    ]


def save_split(path: Path, dataset: LabelledSet, split: Split) -> None:
    """Write a split as a file that `load_split` reads."""
    values = {name: list(getattr(split, name)) for name in NAMES}
    write_json(path, {"dataset": dataset.config.name, "repeat": split.repeat, "origin": split.origin, **values})


def load_split(path: Path, dataset: LabelledSet, repeat: int = 0) -> Split:
    """Read a split file (JSON with train, val and test: lists of case ids) and check it.

    Raises:
        ConfigError: The file is missing or no such file, or the split is refused by `check_split`.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: tuple(str(item) for item in content[name]) for name in NAMES}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"split file {path} must be JSON with lists train, val and test: {type(error).__name__} {error}"
        ) from error
    split = Split(parts["train"], parts["val"], parts["test"], repeat, f"file {path.name}")
    check_split(dataset, split)
    return split


def _patients(cases: Sequence[Case]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.patient].append(case)
    return groups


def _stratum(cases: Sequence[Case]) -> str:
    """The label that most of a patient's cases have; for multi-label whether anything is positive."""
    labels = [str(case.label) if isinstance(case.label, int) else str(1 in case.label) for case in cases]
    return sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0][0]


def _ordered(groups: Mapping[str, list[Case]], seed: int, *position: int | str) -> list[str]:
    # By a hash of the name: independent of folder order, and adding a patient moves no other.
    return sorted(groups, key=lambda patient: derive_seed(seed, "split", *position, patient))


def _hold_out(
    groups: Mapping[str, list[Case]], fraction: float, seed: int, *position: int | str
) -> tuple[list[str], list[str]]:
    """Return patients kept and held out, the held out ones spread over strata in proportion (largest remainder)."""
    strata: dict[str, list[str]] = defaultdict(list)
    for patient in _ordered(groups, seed, *position):
        strata[_stratum(groups[patient])].append(patient)
    wanted = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    shares = {name: wanted * len(members) / len(groups) for name, members in strata.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda one: (counts[one] - shares[one], derive_seed(seed, "stratum", *position, one))):
        if sum(counts.values()) < wanted and counts[name] < len(strata[name]):
            counts[name] += 1
    held = [patient for name, members in strata.items() for patient in members[: counts[name]]]
    chosen = set(held)
    return [patient for patient in groups if patient not in chosen], held


def _draw(
    dataset: LabelledSet, groups: Mapping[str, list[Case]], val_fraction: float, test_fraction: float, seed: int, repeat: int
) -> Split:
    if len(groups) < 3:
        raise ConfigError(f"data set {dataset.config.name} has {len(groups)} patients; train, val and test need three at least")
    for attempt in range(_ATTEMPTS):
        rest, test = _hold_out(groups, test_fraction, seed, repeat, attempt, "test")
        remaining = {patient: groups[patient] for patient in rest}
        train, val = _hold_out(remaining, val_fraction / (1 - test_fraction), seed, repeat, attempt, "val")
        split = _split(dataset, groups, train, val, test, repeat, f"seed {seed}, by patient, draw {attempt}")
        if not _absent_classes(dataset, _cases(groups, train)):
            return split
    return split  # check_split names the classes that train lacks


def _complete(
    dataset: LabelledSet, groups: Mapping[str, list[Case]], val_fraction: float, test_fraction: float, seed: int, repeat: int
) -> Split:
    """Fill in what the publishers' split lacks; cases without a split are left out."""
    given = {name: [case for case in dataset.cases if case.split == name] for name in NAMES}
    origin = "publishers' split"
    train_groups = _patients(given["train"])
    if not given["test"]:
        # What is published as validation without a test (CheXpert) is the only clean held-out part: it becomes the test.
        given["test"], given["val"] = given["val"], []
        origin += ", its validation part is the test"
    if not given["test"]:
        kept, held = _hold_out(train_groups, test_fraction, seed, repeat, "test")
        given["test"], given["train"] = _cases(train_groups, held), _cases(train_groups, kept)
        train_groups = _patients(given["train"])
        origin += f", test held out from train by patient, seed {seed}"
    if not given["val"]:
        kept, held = _hold_out(train_groups, val_fraction, seed, repeat, "val")
        given["val"], given["train"] = _cases(train_groups, held), _cases(train_groups, kept)
        origin += f", validation held out from train by patient, seed {seed}"
    ids = {name: tuple(case.id for case in given[name]) for name in NAMES}
    return Split(ids["train"], ids["val"], ids["test"], repeat, origin)


def _cases(groups: Mapping[str, list[Case]], patients: Sequence[str]) -> list[Case]:
    return [case for patient in patients for case in groups[patient]]


def _split(
    dataset: LabelledSet,
    groups: Mapping[str, list[Case]],
    train: Sequence[str],
    val: Sequence[str],
    test: Sequence[str],
    repeat: int,
    origin: str,
) -> Split:
    parts = [tuple(sorted(case.id for case in _cases(groups, patients))) for patients in (train, val, test)]
    return Split(parts[0], parts[1], parts[2], repeat, origin)


def _absent_classes(dataset: LabelledSet, train: Sequence[Case]) -> list[str]:
    labels = np.array([case.label for case in train], dtype=np.int64)
    names = dataset.config.classes
    if dataset.kind == "multilabel":
        return [name for index, name in enumerate(names) if not len(labels) or not (labels[:, index] == 1).any()]
    present = set(labels.tolist())
    return [name for index, name in enumerate(names) if index not in present]
