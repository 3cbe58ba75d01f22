"""Results on disk: cases.csv, metrics.json, report.html with overlays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meddino
from meddino.core.files import write_json, write_text
from meddino_evaluation.metrics.label_metrics import METRICS, LabelRow
from meddino_evaluation.metrics.tables import summarise, write_cases
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.report import report_html


@dataclass(frozen=True)
class TestRow:
    """One line of cases.csv.

    Attributes:
        fold: Fold whose test part holds the case.
        seed: Seed of the network.
        patient: Who it is, for resampling patients.
        site: Hospital or scanner, or "".
        row: The metrics.
    """

    fold: int
    seed: int
    patient: str
    site: str
    row: LabelRow

    def values(self) -> dict[str, Any]:
        """Return all columns."""
        return {**self.row.values(), "fold": self.fold, "seed": self.seed, "patient": self.patient, "site": self.site}


COLUMNS = ("case", "label", *METRICS, "fold", "seed", "patient", "site")


def write_results(experiment: Experiment, rows: Sequence[TestRow], out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Write cases.csv, metrics.json and report.html.

    Args:
        experiment: What was run.
        rows: One a case, label and seed.
        out: Folder of the results.
        seconds: Time of each phase.

    Returns:
        The content of metrics.json.
    """
    plain = [row.values() for row in rows]
    write_cases(out / "cases.csv", plain, COLUMNS)
    metrics = {
        "format": "meddino-segmentation",
        "version": meddino.__version__,
        "model": {"name": experiment.source.name, "hash": experiment.source.model_hash, "lineage": experiment.source.lineage},
        "data": {
            "name": experiment.dataset.name,
            "hash": experiment.dataset.data_hash([*experiment.dataset.cases, *experiment.dataset.test_cases]),
            "cases": len(experiment.dataset.cases),
            "labels": list(experiment.dataset.labels.names),
        },
        "config": experiment.config.model_dump(mode="json"),
        "seconds": {phase: round(time, 2) for phase, time in seconds.items()},
        "leakage": experiment.leakage.summary(),
        "rule_for_empty_labels": "both empty: left out; one empty: Dice, IoU and NSD are 0, distances are left out",
        "test": summarise(plain, experiment.config.metrics.bootstrap),
    }
    write_json(out / "metrics.json", metrics)
    write_text(out / "report.html", report_html(experiment, plain, metrics, out))
    return metrics
