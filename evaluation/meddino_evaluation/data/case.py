"""One case of a labelled data set, whatever its label: a label map, a class, or several labels."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_NOBODY = {"", "-", "?", "anonymous", "anonymized", "n/a", "na", "nan", "none", "null", "unknown"}
ClassLabel = int | tuple[int, ...]
"""Class number; for several labels 0, 1 or -1 (not known) for each."""
LabelT = TypeVar("LabelT", bound=ClassLabel | Path | None)


@dataclass(frozen=True)
class Case(Generic[LabelT]):
    """One image or volume with its label.

    Attributes:
        name: Unique in its data set.
        images: One file a channel; `file.npz#array` and the like for what lies inside a file.
        label: What is to be found: a label map's file (None: there is none), or the class.
        patient: Whoever shares this text is never on both sides of a split; the case itself where nobody knows.
        site: Hospital or scanner the report groups by; "" if unknown.
        split: The part that the publishers put it in, if any.
    """

    name: str
    images: tuple[Path, ...]
    label: LabelT
    patient: str
    site: str = ""
    split: str | None = None

    @property
    def source(self) -> str:
        """The first image, as readers take it."""
        return str(self.images[0])


LabelMapCase = Case[Path | None]
ClassCase = Case[ClassLabel]


def doubtful_patients(cases: Sequence[Case[Any]]) -> list[str]:
    """Return notes on patients that may be one, written in two ways, and on words that stand for nobody."""
    patients = Counter(case.patient for case in cases)
    alike: dict[str, list[str]] = {}
    for patient in sorted(patients):
        plain = re.sub(r"[\s_-]+", "-", patient.strip().casefold())
        alike.setdefault(re.sub(r"(?<!\d)0+(?=\d)", "", plain), []).append(patient)
    pairs = [" and ".join(f"'{one}'" for one in each) for each in alike.values() if len(each) > 1]
    nobody = [name for name, count in patients.items() if name.strip().casefold() in _NOBODY and count > 1]
    notes = [f"patients taken for different people whose names differ in writing alone: {a_few(pairs)}"] if pairs else []
    return notes + [f"{patients[name]} cases have the patient '{name}', and are taken for one person's" for name in nobody]


def labels_array(cases: Sequence[ClassCase]) -> NDArray[np.int64]:
    """Return labels [n] or [n, labels]."""
    return np.array([case.label for case in cases], dtype=np.int64)


def a_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
