"""Training on few patients: who is drawn, and how learning curves are made of it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from meddino.core.seeds import derive_seed
from meddino_evaluation.adaptation.config import FewShotConfig
from meddino_evaluation.data.case import ClassCase
from meddino_evaluation.metrics.classification import TaskKind


@dataclass(frozen=True)
class Draw:
    """Some training patients.

    Attributes:
        setting: "shots=4" or "fraction=0.1".
        number: Of the draw, from 0.
        places: Places of the chosen cases in the training part.
    """

    setting: str
    number: int
    places: tuple[int, ...]


def few_shot_draws(cases: Sequence[ClassCase], kind: TaskKind, classes: int, config: FewShotConfig, seed: int) -> list[Draw]:
    """Return every draw of every number of patients a class, then of every fraction of the training patients.

    All cases of a chosen patient are taken. A class with fewer patients than asked for gives all it has; a number that no
    class can fill any better than the number before is left out.

    Args:
        cases: The training part.
        kind: Kind of task; for several labels a patient counts for each label that is positive.
        classes: Classes or labels.
        config: Numbers, draws and fractions.
        seed: Draws depend on it and on patients' names, not on order.
    """
    owners = _patients_by_class(cases, kind, classes)
    draws = []
    largest = 0
    for shots in sorted(config.patients_per_class):
        reachable = max(min(shots, len(patients)) for patients in owners)
        if reachable <= largest:
            continue
        largest = reachable
        for number in range(config.draws):
            chosen: set[str] = set()
            for label, patients in enumerate(owners):
                # Ordered once a draw: the patients of 1 shot are among those of 2, so curves differ by data, not by luck.
                order = sorted(patients, key=lambda one, place=(number, label): derive_seed(seed, "shots", *place, one))  # type: ignore[misc]
                chosen.update(order[:shots])
            draws.append(Draw(f"shots={shots}", number, _places(cases, chosen)))
    for fraction in config.fractions:
        everybody = sorted({case.patient for case in cases})
        draws += [
            Draw(f"fraction={fraction:g}", number, _places(cases, _fraction(everybody, owners, fraction, seed, number)))
            for number in range(config.draws if fraction < 1 else 1)
        ]
    return draws


def _patients_by_class(cases: Sequence[ClassCase], kind: TaskKind, classes: int) -> list[list[str]]:
    owners: list[set[str]] = [set() for _ in range(classes)]
    for case in cases:
        if kind == "multilabel":
            assert isinstance(case.label, tuple)
            for label, value in enumerate(case.label):
                if value == 1:
                    owners[label].add(case.patient)
        else:
            assert isinstance(case.label, int)
            owners[case.label].add(case.patient)
    return [sorted(patients) for patients in owners]


def _fraction(everybody: list[str], owners: list[list[str]], fraction: float, seed: int, number: int) -> set[str]:
    order = sorted(everybody, key=lambda one: derive_seed(seed, "fraction", number, one))
    chosen = set(order[: max(1, round(fraction * len(order)))])
    place = {patient: rank for rank, patient in enumerate(order)}
    for patients in owners:  # one patient of every class at least: nothing could be learned of the others
        if patients and not chosen.intersection(patients):
            chosen.add(min(patients, key=lambda one: place[one]))
    return chosen


def _places(cases: Sequence[ClassCase], patients: set[str]) -> tuple[int, ...]:
    return tuple(place for place, case in enumerate(cases) if case.patient in patients)


def curve_points(estimates: dict[str, float]) -> list[tuple[float, float]]:
    """Turn {"shots=1": value, ...} into points of a curve, in order; other settings are left out."""
    points: dict[float, float] = defaultdict(float)
    for setting, value in estimates.items():
        name, _, amount = setting.partition("=")
        if name in ("shots", "fraction"):
            points[float(amount)] = value
    return sorted(points.items())
