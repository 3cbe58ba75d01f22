"""One case of a labelled data set, whatever its label: a label map, a class, or several labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

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


def labels_array(cases: Sequence[ClassCase]) -> NDArray[np.int64]:
    """Return labels [n] or [n, labels]."""
    return np.array([case.label for case in cases], dtype=np.int64)


def a_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
