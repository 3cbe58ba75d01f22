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

from meddino.core.config import differences
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

_SAYS_NOTHING = (
    *("device", "splits.", "labels.use", "metrics.", "data.cache", "data.modality", "inference.batch_size"),
    *("training.map_cache_mib", "training.log_every_steps", "training.save_every_steps"),
)
"""How settings begin that change no number, or whose effect is compared itself (labels, modality, who was trained on)."""
_NAMED_CASES = 20
"""Cases that a note names at most; comparison.json has all."""


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
        for own in self.by_seed(metric):
            for case, value in own.items():
                found.setdefault(case, []).append(value)
        return {case: float(np.mean(values)) for case, values in found.items()}

    def by_seed(self, metric: str) -> list[dict[str, float]]:
        """Return for each seed the mean of a metric over labels, by case."""
        seeds = sorted({row["seed"] for row in self.rows})
        return [case_means([row for row in self.rows if row["seed"] == seed], metric) for seed in seeds]

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


@dataclass(frozen=True)
class SharedCases:
    """What several runs measured on the cases that all of them have.

    Attributes:
        cases: Sorted.
        patients: Of each case.
        values: [runs, cases], means over labels and seeds.
        left_out: For each run that has more cases, by its name, those that are not compared.
    """

    cases: tuple[str, ...]
    patients: tuple[str, ...]
    values: NDArray[np.float64]
    left_out: dict[str, list[str]]


def shared_cases(variants: Sequence[Variant], metric: str) -> SharedCases:
    """Take from each run the cases that all of them have.

    Raises:
        ConfigError: There is none, or a case is one patient's in one run and another's in another.
    """
    tables = [variant.by_case(metric) for variant in variants]
    cases = sorted(set.intersection(*(set(table) for table in tables)))
    if not cases:
        raise ConfigError(f"these runs share no test case with a defined {metric}")
    owners = [{str(row["case"]): str(row["patient"]) for row in variant.rows} for variant in variants]
    for variant, own in zip(variants, owners, strict=True):
        other = next((case for case in cases if own[case] != owners[0][case]), None)
        if other is not None:
            raise ConfigError(
                f"case {other} is of patient '{owners[0][other]}' in {variants[0].folder} and of '{own[other]}' in "
                f"{variant.folder}: compare runs with the same data.patient_pattern and patients.csv"
            )
    left_out = {
        variant.name: sorted(set(table) - set(cases))
        for variant, table in zip(variants, tables, strict=True)
        if len(table) > len(cases)
    }
    values = np.array([[table[case] for case in cases] for table in tables])
    return SharedCases(tuple(cases), tuple(owners[0][case] for case in cases), values, left_out)


def check_comparable(variants: Sequence[Variant]) -> None:
    """Refuse runs whose numbers are not of the same thing; what an older metrics.json does not say is not looked at.

    Raises:
        ConfigError: Data, labels, modality or the tolerance of surfaces differ; says how.
    """
    if len({variant.metrics["data"]["hash"] for variant in variants}) > 1:
        raise ConfigError("these runs were made on different data: " + ", ".join(str(variant.folder) for variant in variants))
    known = [_measured(variant) for variant in variants]
    for what in known[0]:
        values = {variant.name: one[what] for variant, one in zip(variants, known, strict=True) if one[what] is not None}
        if len(set(map(str, values.values()))) > 1:
            said = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise ConfigError(f"these runs cannot be compared, as their {what} differ: {said}")


def _measured(variant: Variant) -> dict[str, Any]:
    """Return what a run's numbers are of; None: its metrics.json does not say."""
    data, metrics = variant.metrics["data"], variant.metrics.get("config", {}).get("metrics", {})
    return {
        "labels": sorted(data["labels"]) if "labels" in data else None,
        "modalities": data.get("modality"),
        "tolerances of surfaces (metrics.tolerance_mm)": metrics.get("tolerance_mm"),
    }


def training_differences(variants: Sequence[Variant], metric: str = "dice") -> list[str]:
    """Return a line for each thing, beside the model, in which trainings differ that are set side by side.

    That is from which cases the networks learned that were tested on a case (splits.json), seeds, and settings; each run is
    held against the first.
    """
    first, *others = variants
    known = [(variant, _learned_from(variant.folder)) for variant in variants]
    lines = [f"{run.name}: no splits.json tells from which cases its networks learned" for run, learned in known if not learned]
    cases, learned_first = shared_cases(variants, metric).cases, known[0][1]
    for variant, learned in known[1:]:
        other = [case for case in cases if case in learned and case in learned_first and learned[case] != learned_first[case]]
        if other:
            lines.append(
                f"{variant.name} against {first.name}: {len(other)} of {len(cases)} test cases were tested on networks that "
                f"learned from other cases: {_named(other)}"
            )
    for variant in others:
        found = differences(_settings(first), _settings(variant))
        lines += [
            f"{variant.name} against {first.name}: {line}"
            for line in found
            if not line.startswith(_SAYS_NOTHING) and "(absent)" not in line
        ]
    return lines


def _settings(variant: Variant) -> dict[str, Any]:
    return {**variant.metrics.get("config", {}), "prompts": "prompts" in variant.metrics}


def _learned_from(folder: Path) -> dict[str, set[frozenset[str]]]:
    """Return for each test case the sets of cases from which its networks learned: one, or one a fold and seed."""
    path = folder / "splits.json"
    if not path.is_file():
        return {}
    learned: dict[str, set[frozenset[str]]] = {}
    for part in json.loads(path.read_text(encoding="utf-8")):
        for case in part["test"]:
            learned.setdefault(case, set()).update(frozenset(few) for few in part["labelled"].values())
    return learned


def _named(cases: Sequence[str]) -> str:
    more = len(cases) - _NAMED_CASES
    return ", ".join(cases[:_NAMED_CASES]) + (f" and {more} more" if more > 0 else "")


def compare(variants: Sequence[Variant], metric: str = "dice", resamples: int = 2000) -> dict[str, Any]:
    """Compare runs on the cases that all of them have.

    Args:
        variants: At least one.
        metric: Column of cases.csv; larger is better.
        resamples: Of the patients.

    Returns:
        "variants": mean and standard deviation over seeds, 95 % interval over patients, mean rank, share of resamples in
        which it is first, all of them on the shared cases. "left_out": for each run its cases that are not shared; "notes"
        says so for people. "pairs": difference, its interval, p of Wilcoxon and of the permutation test, both over patients,
        and both also after Holm over all pairs; "smallest_p" is the least that so many patients can give, "permutations" how
        many were drawn (0: all were tried). "ranking_tau": mean Kendall tau between the ranking and that of a resample.
        "patients": how many; with fewer than six all that says how sure a number is (intervals, p values, ranks over resamples,
        tau) is None: resamples of one patient all agree.

    Raises:
        ConfigError: They were run on other data or labels, or share no case.
    """
    check_comparable(variants)
    shared = shared_cases(variants, metric)
    cases, patients, values = shared.cases, shared.patients, shared.values
    ranks, tau = rank_stability(values, patients, resamples)
    entries: list[dict[str, Any]] = []
    for variant, own, (mean_rank, first) in zip(variants, values, ranks, strict=True):
        interval = bootstrap_mean(own, groups=patients, span=SHARE, resamples=resamples)
        seeds = [[one[case] for case in cases if case in one] for one in variant.by_seed(metric)]
        mean, std = mean_and_std([float(np.mean(one)) for one in seeds if one])
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
    notes = [
        f"{name}: {len(lost)} of its {len(lost) + len(cases)} test cases are left out, which another run lacks or in which its "
        f"{metric} is undefined: {_named(lost)}"
        for name, lost in shared.left_out.items()
    ]
    return {
        **{"metric": metric, "patients": len(set(patients)), "variants": entries, "pairs": pairs, "ranking_tau": tau},
        **{"left_out": shared.left_out, "notes": notes},
    }


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
