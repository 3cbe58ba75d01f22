"""The jobs of `meddino-eval study lvm-med`: models x tasks of the field whose data lie under a root."""

import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json, write_json
from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.study.jobs import DONE, folder_hash, weights_hash
from meddino_evaluation.tasks.definition import OfTask, TaskDefinition, TaskKind, load_task, task_names

RUNNERS: Mapping[TaskKind, str] = {
    "segmentation2d": "meddino_evaluation.tasks.run",
    "segmentation_slices": "meddino_evaluation.tasks.run",
    "detection": "meddino_evaluation.detection.command",
    "classification": "meddino_evaluation.classification.commands",
    "prompts": "meddino_evaluation.prompts.run",
}
"""Kind of task to the module whose `run_task(task, model, root, out, overrides)` does it; also the order in tables."""


@dataclass(frozen=True)
class TaskJob:
    """One model on one task.

    Attributes:
        model: As `load_backbone` takes it.
        task: What is done.
        root: Folder of the task's data.
        overrides: Settings of the user, `key=value`.
        weights: Hash of the model's weights, where they lie in a file or folder.
        contents: Hash of the task's data, see `folder_hash`.
    """

    model: str
    task: TaskDefinition
    root: Path
    overrides: tuple[str, ...] = ()
    weights: str | None = None
    contents: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one whenever anything about the job is different."""
        definition = self.task.model_dump(mode="json", exclude={"published", "title", "citation", "licence", "where", "notes"})
        what = [self.model, self.weights, definition, str(self.root), self.contents, self.overrides]
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:10]
        name = re.sub(r"[^A-Za-z0-9]+", "_", model_name(self.model)).strip("_")
        return f"{name}-{self.task.name}-{digest}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{model_name(self.model)} on {self.task.name}"

    def run(self, folder: Path) -> None:
        """Learn and test."""
        write_json(folder / "job.json", {"model": self.model, "task": self.task.name})
        importlib.import_module(RUNNERS[self.task.kind]).run_task(self.task, self.model, self.root, folder, self.overrides)


def chosen_tasks(names: Sequence[str]) -> list[TaskDefinition]:
    """Return tasks by name, or all that are shipped, in the order of their kinds.

    Raises:
        ConfigError: There is no such task.
    """
    tasks = [load_task(name) for name in (names or task_names())]
    order = list(RUNNERS)
    return sorted(tasks, key=lambda task: (order.index(task.kind), task.name))


def data_folder(task: TaskDefinition, root: Path) -> Path:
    """Return where the data of a task lie under the root of a study."""
    name = task.layout.task if isinstance(task.layout, OfTask) else task.name
    return root / (task.folder or name)


def list_task_jobs(
    models: Sequence[str], tasks: Sequence[TaskDefinition], root: Path, overrides: Sequence[str]
) -> tuple[list[TaskJob], list[TaskDefinition]]:
    """Return the jobs of the tasks whose data are there, and the tasks whose data are not.

    Args:
        models: As `load_backbone` takes them; the first is the one that the others are compared with.
        tasks: Wanted.
        root: Folder with a folder for each task.
        overrides: `key=value` for every task, or `TASK:key=value` and `KIND:key=value` for one task or kind.

    Raises:
        ConfigError: An override names no task and no kind, or two models have one name.
    """
    names = [model_name(model) for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two models are called {twice[0]}: give them names of their own, NAME=MODEL")
    present = [task for task in tasks if data_folder(task, root).is_dir()]
    missing = [task for task in tasks if task not in present]
    weights = {model: weights_hash(model) for model in models}
    contents = {task.name: folder_hash(data_folder(task, root)) for task in present}
    jobs = [
        TaskJob(model, task, data_folder(task, root), _overrides_of(task, overrides), weights[model], contents[task.name])
        for task in present
        for model in models
    ]
    _overrides_of(None, overrides)
    return jobs, missing


def _overrides_of(task: TaskDefinition | None, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of a task; without a task only look whether each names one that there is."""
    known, own = {*task_names(), *RUNNERS}, []
    for text in overrides:
        head, colon, rest = text.partition(":")
        if not colon or "=" in head:
            own.append(text)
        elif head not in known and (task is None or head != task.name):
            raise ConfigError(
                f"'{text}': '{head}' is no task and no kind; kinds: {', '.join(RUNNERS)}; tasks: {', '.join(task_names())}"
            )
        elif task is not None and head in (task.name, task.kind):
            own.append(rest)
    return tuple(own)


def load_task_results(jobs: Sequence[TaskJob], out: Path) -> list[tuple[TaskJob, dict[str, Any]]]:
    """Return what the finished jobs found."""
    paths = [(job, out / "jobs" / job.folder / DONE) for job in jobs]
    return [(job, json.loads(path.read_text(encoding="utf-8"))) for job, path in paths if path.is_file()]
