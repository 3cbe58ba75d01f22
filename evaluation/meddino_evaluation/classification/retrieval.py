"""Retrieval: how well a test case finds cases of its class among other patients' cases."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meddino.core.device import find_machine
from meddino.core.files import atomic_write
from meddino_evaluation.adaptation.features import FeatureExtractor, make_transform
from meddino_evaluation.adaptation.knn import retrieval_per_case
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.config import ClassificationConfig
from meddino_evaluation.classification.datasets import LabelledSet
from meddino_evaluation.classification.evaluate import choose_splits
from meddino_evaluation.classification.results import finite, write_metrics
from meddino_evaluation.data.case import labels_array
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.metrics.statistics import SHARE, bootstrap_mean, mean_and_std


def retrieve(backbone: Backbone, dataset: LabelledSet, config: ClassificationConfig, out: Path) -> dict[str, Any]:
    """Query with the test cases in a gallery of train and val; nothing is learned or chosen.

    Writes per_case.csv (one row a query) and metrics.json with means, deviations over repeats and intervals over patients.

    Raises:
        ConfigError: The split is refused, or the folder holds somebody else's files.
    """
    refuse_files_of_others(out, ("per_case.csv", "metrics.json"))
    splits = choose_splits(dataset, config)
    write_settings(out, config)
    transform = make_transform(backbone, config.features, dataset.config)
    cache = config.features.cache or out / "features"
    extractor = FeatureExtractor(backbone, transform, config.features, cache, find_machine(config.features.device))
    by_id = {case.name: case for case in dataset.cases}
    rows: list[dict[str, Any]] = []
    for split in splits:
        gallery, queries = [by_id[name] for name in (*split.train, *split.val)], [by_id[name] for name in split.test]
        pooling = config.features.pooling
        values = retrieval_per_case(
            extractor(queries).vectors(pooling=pooling),
            labels_array(queries),
            extractor(gallery).vectors(pooling=pooling),
            labels_array(gallery),
        )
        rows += [
            {"repeat": split.number, "case": case.name, "patient": case.patient}
            | {name: float(one[place]) for name, one in values.items()}
            for place, case in enumerate(queries)
        ]
    extractor.check_frozen()
    content = {
        "format": "meddino-retrieval",
        "version": 1,
        "model": {"name": backbone.name, "hash": extractor.model_hash},
        "data": dataset.config.name,
        "metrics": _summaries(rows, config),
        "config": config.model_dump(mode="json"),
    }
    with atomic_write(out / "per_case.csv", "w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_metrics(out / "metrics.json", content)
    result: dict[str, Any] = finite(content)
    return result


def _summaries(rows: Sequence[dict[str, Any]], config: ClassificationConfig) -> dict[str, Any]:
    """Return mean and deviation over repeats, and the interval over patients, of every column."""
    metrics: dict[str, Any] = {}
    for name in [name for name in rows[0] if name not in ("repeat", "case", "patient")]:
        numbers = np.array([row[name] for row in rows])
        repeats = np.array([row["repeat"] for row in rows])
        interval = bootstrap_mean(
            numbers,
            groups=[row["patient"] for row in rows],
            span=SHARE,
            level=config.statistics.level,
            resamples=config.statistics.resamples,
            seed=config.split.seed,
        )
        each = [mean_and_std(numbers[repeats == repeat])[0] for repeat in np.unique(repeats)]
        mean, deviation = mean_and_std(each)
        metrics[name] = {"mean": mean, "std": deviation, "low": interval.low, "high": interval.high, "runs": each}
    return metrics
