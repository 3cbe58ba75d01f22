"""What is lost on hospitals that were not trained on: in and out of distribution side by side, the drop, and its tests."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.metrics.statistics import holm
from meddino_evaluation.metrics.text_table import Table, number_text
from meddino_evaluation.metrics.unpaired import UnpairedResult, unpaired_means
from meddino_evaluation.study.segmentation_runs import Variant, shared_cases


def drops(variants: Sequence[Variant], external: Mapping[str, Sequence[Variant]], resamples: int = 2000) -> dict[str, Any]:
    """Compare each model's Dice on its own test part with each set from elsewhere, and what two models lose there.

    Of every set those cases count that all models have.

    Args:
        variants: Runs on one data set.
        external: For each test set from elsewhere the same runs on it, in the same order.
        resamples: Of the patients of both sets.

    Returns:
        "drops": for each set and model the two means and their difference with a 95 % interval and the p value of a two-sample
        permutation test: other patients, so nothing is paired. "pairs": for two models the difference of their drops. It is
        paired within each set: of each case the difference of the two models is taken, and these differences are compared
        between the sets. Both have p after Holm over their table.
    """
    found: dict[str, list[dict[str, Any]]] = {"drops": [], "pairs": []}
    own = shared_cases(variants, "dice")
    for site, others in external.items():
        there = shared_cases(others, "dice")
        patients = own.patients, there.patients
        for variant, inside, outside in zip(variants, own.values, there.values, strict=True):
            result = _compared(inside, outside, patients, resamples)
            means = {"inside": float(inside.mean()), "outside": float(outside.mean())}
            row = {"name": variant.name + variant.leakage_mark, "set": site, "cases": len(outside), **means}
            found["drops"].append(row | _numbers(result))
        for first, second in itertools.combinations(range(len(variants)), 2):
            differences = own.values[first] - own.values[second], there.values[first] - there.values[second]
            pair = {"first": variants[first].name, "second": variants[second].name, "set": site}
            found["pairs"].append(pair | _numbers(_compared(*differences, patients, resamples)))
    for rows in found.values():
        adjusted = holm([math.nan if row["p"] is None else row["p"] for row in rows])
        for row, value in zip(rows, adjusted.tolist(), strict=True):
            row["p_holm"] = None if math.isnan(value) else value
    return found


def drop_table(found: dict[str, Any]) -> Table:
    """Return one row a set and model."""
    header = ("test set", "model", "Dice in distribution", "Dice there", "drop", "95 %", "p", "after Holm", "cases there")
    rows = [
        (
            *(row["set"], row["name"], f"{row['inside']:.3f}", f"{row['outside']:.3f}"),
            *(number_text(row["difference"], "+.3f"), _interval(row), number_text(row["p"]), number_text(row["p_holm"])),
            str(row["cases"]),
        )
        for row in found["drops"]
    ]
    return Table(header, tuple(rows))


def drop_pair_table(found: dict[str, Any]) -> Table:
    """Return one row a set and pair of models."""
    rows = [
        (
            *(row["set"], f"{row['first']} - {row['second']}"),
            *(number_text(row["difference"], "+.3f"), _interval(row), number_text(row["p"]), number_text(row["p_holm"])),
        )
        for row in found["pairs"]
    ]
    return Table(("test set", "pair", "difference of drops", "95 %", "p", "after Holm"), tuple(rows))


def _compared(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    patients: tuple[Sequence[str], Sequence[str]],
    resamples: int,
) -> UnpairedResult:
    return unpaired_means(inside, outside, groups_a=patients[0], groups_b=patients[1], resamples=resamples)


def _numbers(result: UnpairedResult) -> dict[str, Any]:
    values = {"difference": result.difference, "low": result.low, "high": result.high, "p": result.p_value}
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _interval(row: dict[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
