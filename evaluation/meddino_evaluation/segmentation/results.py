"""Results on disk: cases.csv, metrics.json, report.html with overlays."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import meddino
from meddino.core.files import write_json, write_text
from meddino.core.logging import get_logger
from meddino_evaluation.metrics.label_metrics import METRICS
from meddino_evaluation.metrics.tables import IN_PIXELS, in_pixels, summarise, write_cases
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.inference.held_out import HeldOutSet
from meddino_evaluation.segmentation.overlay import label_colours
from meddino_evaluation.segmentation.report import report_html

logger = get_logger(__name__)
NOTHING: Mapping[str, Any] = MappingProxyType({})
RESULTS = ("cases.csv", "metrics.json", "report.html", "splits.json", "splits_final.json")
"""What a run writes into its folder, config.yaml before them."""
COLUMNS = ("case", "label", *METRICS, "fold", "seed", "patient", "site")


def write_results(
    experiment: Experiment,
    own: HeldOutSet,
    others: Sequence[HeldOutSet],
    seconds: dict[str, float],
    what: str | None = None,
    facts: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """Write cases.csv, metrics.json and report.html; the first two also for every test set from elsewhere.

    Args:
        experiment: What was run.
        own: Its own test part.
        others: Test sets from elsewhere.
        seconds: Time of each phase.
        what: What was trained, in words; None: by the settings of a segmentation.
        facts: More for metrics.json.

    Returns:
        The content of metrics.json.
    """
    external = {tested.name: _write(experiment, tested, {}) for tested in others}
    parts = {
        name: {**{key: found[key] for key in ("test", "leakage", "failed")}, "notes": found["data"]["notes"]}
        for name, found in external.items()
    }
    more = {"seconds": {phase: round(time, 2) for phase, time in seconds.items()}, "external": parts, **facts}
    metrics = _write(experiment, own, more)
    plain = [row.values() for row in own.rows]
    write_text(own.out / "report.html", report_html(experiment, plain, metrics, own.out, what))
    return metrics


def _write(experiment: Experiment, tested: HeldOutSet, more: dict[str, Any]) -> dict[str, Any]:
    plain: list[dict[str, Any]] = [row.values() for row in tested.rows]
    dataset, test = tested.dataset, summarise(plain, experiment.config.metrics.bootstrap)
    undefined = [name for name, part in test["by_label"].items() if part["dice"]["mean"] is None]
    if undefined:
        where = tested.name or "the test part"
        logger.warning("%s: no case and no prediction holds the labels %s: their metrics are undefined", where, undefined)
    if dataset.flat:
        write_cases(tested.out / "cases.csv", in_pixels(plain), [IN_PIXELS.get(name, (name, 1))[0] for name in COLUMNS])
        test = in_pixels(test)
    else:
        write_cases(tested.out / "cases.csv", plain, COLUMNS)
    metrics: dict[str, Any] = {
        "format": "meddino-segmentation",
        "version": meddino.__version__,
        "model": {"name": experiment.source.name, "hash": experiment.source.model_hash, "lineage": experiment.source.lineage},
        "data": {
            "name": dataset.name,
            "hash": dataset.data_hash(dataset.all_cases),
            "cases": len(dataset.cases),
            "labels": list(dataset.labels.names),
            "modality": dataset.modality,
            "notes": list(dataset.notes),
            "label_colours": label_colours(dataset.labels.names),
        },
        "config": experiment.config.model_dump(mode="json"),
        "splits": {str(split.number): split.origin for split in experiment.splits},
        "leakage": tested.leakage.summary(),
        "failed": tested.failed,
        "rule_for_empty_labels": "both empty: left out; one empty: Dice, IoU and NSD are 0, distances are left out",
        "unit": "px" if dataset.flat else "mm",
        "test": test,
        **more,
    }
    write_json(tested.out / "metrics.json", metrics)
    return metrics
