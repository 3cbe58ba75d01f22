"""A task of segmentation from its published files to one headline number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meddino.core.config import load_config
from meddino.core.files import write_json
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.run import segment
from meddino_evaluation.tasks.definition import TaskDefinition
from meddino_evaluation.tasks.prepare import prepare_task

RECIPE = "lvm_med_segmentation"


def run_task(task: TaskDefinition, model: str, root: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Run a task of kind segmentation2d or segmentation_slices; `out` holds metrics.json (with the headline) and cases.csv.

    Args:
        task: The task.
        model: As `load_encoder` takes it.
        root: Folder of the published files.
        out: Folder of the results; the same call again goes on there.
        overrides: `key=value` over the recipe and the task's own.

    Raises:
        MedDINOError: Anything the user can mend.
    """
    prepared = prepare_task(task, root, out / "data")
    config = load_config(SegmentConfig, [RECIPE], [*prepared.overrides, *overrides], kind="evaluation")
    add_headline(task, segment(config, model, prepared.data, out, tests=prepared.tests), out)


def add_headline(task: TaskDefinition, metrics: Mapping[str, Any], out: Path) -> None:
    """Add to metrics.json which task it is, what its data ask of whoever uses them, and its one number, also by site."""
    about = {
        "title": task.title,
        "citation": task.citation,
        "licence": task.licence,
        "where": task.where,
        "split_rule": task.split_rule,
        "notes": task.notes,
        "published": [one.model_dump(mode="json") for one in task.published],
    }
    content = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    content |= {"task": task.name, "about": about, "headline": headline(task.metric, metrics["test"])}
    content["headline_by_site"] = {site: headline(task.metric, part["test"]) for site, part in metrics["external"].items()}
    write_json(out / "metrics.json", content)


def headline(metric: str, test: Mapping[str, Any]) -> dict[str, Any]:
    """Return one metric of a summary: mean and deviation over seeds, interval over patients."""
    found = test[metric]
    low, high = found.get("interval_95", (None, None))
    return {"metric": metric, "mean": found["mean"], "std": found["std"], "low": low, "high": high}
