"""Several segmentation runs on the same test cases: paired tests, Holm, stability of the ranking, one table."""

import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino_evaluation.metrics.label_metrics import case_means
from meddino_evaluation.metrics.statistics import (
    SHARE,
    Resampling,
    bootstrap_mean,
    can_be_significant,
    holm,
    mean_and_std,
    paired_means,
    wilcoxon_signed_rank,
)
from meddino_evaluation.metrics.tables import finite_or_none


@dataclass(frozen=True)
class Variant:
    """One finished run.

    Attributes:
        name: For the table.
        folder: Of its results.
        metrics: Content of metrics.json.
        rows: Content of cases.csv.
    """

    name: str
    folder: Path
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]

    def by_case(self, metric: str) -> dict[str, float]:
        """Return the mean of a metric by case: over labels, then over seeds."""
        found: dict[str, list[float]] = {}
        for seed in sorted({row["seed"] for row in self.rows}):
            for case, value in case_means([row for row in self.rows if row["seed"] == seed], metric).items():
                found.setdefault(case, []).append(value)
        return {case: float(np.mean(values)) for case, values in found.items()}

    @property
    def leakage_mark(self) -> str:
        """A dagger where test volumes were seen in pretraining, "?" where nobody looked, "" where none was or none can be."""
        leakage = self.metrics["leakage"]
        if leakage["test_cases_in_pretraining"]:
            return "†"
        fresh = self.metrics["model"]["name"].startswith("random:") or self.metrics["model"]["name"] == "none"
        return "" if leakage["checked"] or fresh else "?"


def read_variant(name: str, folder: Path) -> Variant:
    """Read the results of a run.

    Raises:
        ConfigError: It is no finished run.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with (folder / "cases.csv").open(newline="", encoding="utf-8") as stream:
            rows = [_numbers(row) for row in csv.DictReader(stream)]
        metrics["test"], metrics["leakage"], metrics["data"]["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is no finished run of `meddino-eval segment` ({type(error).__name__}: {error})") from error
    return Variant(name, folder, metrics, rows)


def compare(variants: Sequence[Variant], metric: str = "dice", resamples: int = 2000) -> dict[str, Any]:
    """Compare runs on the cases that all of them have.

    Args:
        variants: At least one.
        metric: Column of cases.csv; larger is better.
        resamples: Of the patients.

    Returns:
        "variants": mean and standard deviation over seeds, 95 % interval over patients, mean rank, share of resamples in
        which it is first. "pairs": difference, its interval, p of Wilcoxon and of the permutation test, both over patients, and
        both also after Holm over all pairs; "smallest_p" is the least that so many patients can give, "permutations" how many
        were drawn (0: all were tried). "ranking_tau": mean Kendall tau between the ranking and that of a resample. "patients":
        how many; with fewer than six all that says how sure a number is (intervals, p values, ranks over resamples, tau) is
        None: resamples of one patient all agree.

    Raises:
        ConfigError: They were run on other data, or share no case.
    """
    if len({variant.metrics["data"]["hash"] for variant in variants}) > 1:
        raise ConfigError("these runs were made on different data: " + ", ".join(str(variant.folder) for variant in variants))
    tables = [variant.by_case(metric) for variant in variants]
    cases = sorted(set.intersection(*(set(table) for table in tables)))
    if not cases:
        raise ConfigError(f"these runs share no test case with a defined {metric}")
    patient_of = {row["case"]: row["patient"] for row in variants[0].rows}
    patients = [patient_of[case] for case in cases]
    values = np.array([[table[case] for case in cases] for table in tables])
    ranks, tau = rank_stability(values, patients, resamples)
    entries: list[dict[str, Any]] = []
    for variant, own, (mean_rank, first) in zip(variants, values, ranks, strict=True):
        interval = bootstrap_mean(own, groups=patients, span=SHARE, resamples=resamples)
        mean, std = mean_and_std([value for value in variant.metrics["test"][metric]["by_seed"] if value is not None])
        entries.append(
            {
                "name": variant.name,
                "mark": variant.leakage_mark,
                "seeds": len(variant.metrics["test"]["seeds"]),
                "cases": len(cases),
                "mean": finite_or_none(mean),
                "std_over_seeds": finite_or_none(std),
                "interval_95": [finite_or_none(interval.low), finite_or_none(interval.high)],
                "mean_rank": mean_rank,
                "share_first": first,
            }
        )
    pairs = _pairs(variants, values, patients, resamples)
    return {"metric": metric, "patients": len(set(patients)), "variants": entries, "pairs": pairs, "ranking_tau": tau}


def rank_stability(
    values: NDArray[np.float64], patients: Sequence[str], resamples: int
) -> tuple[list[tuple[float | None, float | None]], float | None]:
    """Rank variants anew in bootstrap resamples of the patients.

    Args:
        values: [variants, cases], larger is better.
        patients: Of each case.
        resamples: How many.

    Returns:
        For each variant its mean rank (1 is best; ties share) and the share of resamples in which it is first (ties share),
        and the mean Kendall tau to the ranking of all cases (None for one variant). All None with too few patients for an
        interval: their resamples are hardly different.
    """
    from scipy.stats import kendalltau, rankdata

    if not can_be_significant(len(set(patients))):
        return [(None, None)] * len(values), None

    drawing = Resampling(values.shape[1], patients, resamples=resamples)
    means = np.stack([drawing.means(own) for own in values], axis=1)  # [resamples, variants]
    ranks = rankdata(-means, axis=1).mean(axis=0)
    best = means == means.max(axis=1, keepdims=True)
    first = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    taus = [kendalltau(values.mean(axis=1), one).statistic for one in means] if len(values) > 1 else []
    tau = float(np.nanmean(taus)) if taus and not np.isnan(taus).all() else None
    return [(float(rank), float(share)) for rank, share in zip(ranks, first, strict=True)], tau


def _pairs(
    variants: Sequence[Variant], values: NDArray[np.float64], patients: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = []
    for first, second in itertools.combinations(range(len(variants)), 2):
        result = paired_means(values[first], values[second], groups=patients, resamples=resamples)
        wilcoxon = wilcoxon_signed_rank(values[first], values[second], groups=patients)
        pairs.append(
            {
                "first": variants[first].name,
                "second": variants[second].name,
                "difference": finite_or_none(result.difference),
                "interval_95": [finite_or_none(result.low), finite_or_none(result.high)],
                "p_wilcoxon": finite_or_none(wilcoxon),
                "p_permutation": finite_or_none(result.p_value),
                "smallest_p": finite_or_none(result.smallest_p),
                "permutations": result.permutations,
            }
        )
    for key in ("p_wilcoxon", "p_permutation"):
        defined = [(number, float(pair[key])) for number, pair in enumerate(pairs) if pair[key] is not None]
        adjusted = holm([value for _, value in defined]).tolist() if defined else []
        for pair in pairs:
            pair[f"{key}_holm"] = None
        for (number, _), value in zip(defined, adjusted, strict=True):
            pairs[number][f"{key}_holm"] = value
    return pairs


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    texts = ("case", "label", "patient", "site")
    return {key: value if key in texts else math.nan if value == "" else float(value) for key, value in row.items()}
