"""Studies: a list of jobs that can be stopped, continued, and spread over a SLURM array; the tables come last."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meddino.core.config import check_config, load_config, to_yaml
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import canonical_json, sha256_file, write_json, write_text
from meddino.core.logging import get_logger
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.classification.config import ClassificationConfig, ProtocolName
from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
from meddino_evaluation.classification.evaluate import evaluate
from meddino_evaluation.study.study_config import StudyConfig, StudyData

StudyKind = Literal["compare", "freeze", "few-shot"]
FEW_SHOT = "few-shot"
_log = get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """One model, one data set, one protocol.

    Attributes:
        model: As `load_backbone` takes it.
        dataset: Name or file of the definition.
        root: Its folder.
        protocol: What to run.
        few_shot: On few patients.
        evaluation: All settings.
        weights: Hash of the model's weights, where they lie in a file or folder.
    """

    model: str
    dataset: str
    root: Path
    protocol: ProtocolName
    few_shot: bool
    evaluation: ClassificationConfig
    weights: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one whenever anything about the job is different."""
        settings = self.evaluation.model_dump(mode="json")
        settings["features"]["cache"] = settings["features"]["device"] = None  # where and on what does not matter
        what = [self.model, self.weights, self.dataset, str(self.root), self.protocol, self.few_shot, settings]
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:10]
        names = [re.sub(r"[^A-Za-z0-9]+", "_", Path(one).name).strip("_") for one in (self.model, self.dataset)]
        return "-".join([*names, self.protocol, *(["few_shot"] if self.few_shot else []), digest])


def list_jobs(
    kind: StudyKind, config: StudyConfig, out: Path, model: str | None = None, data_root: Path | None = None
) -> list[Job]:
    """Return all jobs of a study, in an order that does not depend on what is done already.

    Args:
        kind: Which study.
        config: What it compares.
        out: Folder of the study, for the feature cache.
        model: What `{model}` stands for.
        data_root: Data folders are below it.

    Raises:
        ConfigError: `{model}` occurs and no model was given, or an override is wrong.
    """
    if model is None and any("{model}" in one for one in config.models):
        raise ConfigError("the study's models contain {model}: name the export with --model")
    models = [one.replace("{model}", model or "") for one in config.models]
    protocols = _protocols(kind, config)
    weights = {name: _weights_hash(name) for name in models}
    jobs = []
    for data in config.data:
        root = Path(data.root) if data_root is None else data_root / data.root
        for name in models:
            for protocol in protocols:
                settings = _settings(config, data, protocol, kind, out)
                jobs.append(Job(name, data.dataset, root, protocol, kind == FEW_SHOT, settings, weights[name]))
    return jobs


def run_jobs(jobs: Sequence[Job], out: Path, part: tuple[int, int] | None = None) -> list[str]:
    """Run those jobs that are not done.

    A job is done when its metrics.json is there, which is written last. A job that cannot run (weights that are missing, a
    data set that is refused) leaves its reason in error.txt, and the others go on; the same command tries it again.

    Args:
        jobs: From `list_jobs`.
        out: Folder of the study.
        part: (i, n): only every n-th job, from the i-th (1-based), for job arrays.

    Returns:
        One line for each reason for which jobs could not run.
    """
    chosen = [job for place, job in enumerate(jobs) if part is None or place % part[1] == part[0] - 1]
    problems: dict[str, list[str]] = {}
    for number, job in enumerate(chosen):
        folder = out / "jobs" / job.folder
        if (folder / "metrics.json").is_file():
            continue
        _log.info("job %d of %d: %s", number + 1, len(chosen), job.folder)
        try:
            run_job(job, folder)
        except MedDINOError as error:
            write_text(folder / "error.txt", f"{error}\n")
            _log.error("job %s cannot run", job.folder)
            problems.setdefault(str(error), []).append(job.folder)
        else:
            (folder / "error.txt").unlink(missing_ok=True)
    return [
        f"{reason} ({len(names)} jobs: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for reason, names in problems.items()
    ]


def run_job(job: Job, folder: Path) -> None:
    """Run one job."""
    dataset = open_dataset(load_dataset_config(job.dataset), job.root)
    backbone = load_backbone(job.model)
    write_json(folder / "job.json", {"model": job.model, "dataset": job.dataset, "protocol": job.protocol})
    evaluate(backbone, dataset, job.evaluation, folder, few_shot=job.few_shot)


def _weights_hash(model: str) -> str | None:
    """Return the hash of a model's weights, so that another export or a later step of a run under its name is another job."""
    path = Path(model.partition("@")[2] or model)
    if path.is_dir() and not (path / "model.safetensors").is_file():
        try:
            return load_backbone(model).hash()  # a run or a checkpoint, which may grow
        except MedDINOError:
            return None  # its jobs will say why
    path = path / "model.safetensors" if path.is_dir() else path
    return sha256_file(path) if path.is_file() else None


def load_results(jobs: Sequence[Job], out: Path) -> list[tuple[Job, dict[str, Any]]]:
    """Return what the finished jobs found."""
    found = []
    for job in jobs:
        path = out / "jobs" / job.folder / "metrics.json"
        if path.is_file():
            found.append((job, json.loads(path.read_text(encoding="utf-8"))))
    return found


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Read `--part i/n`; without it, a SLURM array's own numbers.

    Raises:
        ConfigError: It is no i/n with 1 <= i <= n.
    """
    if text is None and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        text = f"{int(os.environ['SLURM_ARRAY_TASK_ID']) - first + 1}/{os.environ['SLURM_ARRAY_TASK_COUNT']}"
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: write i/n with 1 <= i <= n, for example 1/8")
    return int(match[1]), int(match[2])


def load_study(source: str, overrides: Sequence[str]) -> StudyConfig:
    """Read a study's configuration."""
    return load_config(StudyConfig, [source], overrides, kind="evaluation")


def save_study(config: StudyConfig, out: Path) -> None:
    """Write the resolved configuration beside the results."""
    write_text(out / "study.yaml", to_yaml(config))


def _protocols(kind: StudyKind, config: StudyConfig) -> tuple[ProtocolName, ...]:
    if kind == "freeze":
        return (config.frozen, config.unfrozen)
    return config.evaluation.few_shot.protocols if kind == FEW_SHOT else config.protocols


def _settings(config: StudyConfig, data: StudyData, protocol: ProtocolName, kind: StudyKind, out: Path) -> ClassificationConfig:
    plain = config.evaluation.model_dump(mode="json")
    plain["protocols"] = [protocol]
    if kind == FEW_SHOT:
        plain["few_shot"]["protocols"] = [protocol]
    plain["features"]["cache"] = str(config.features or out / "features")
    where = f"study, evaluation of {data.dataset}"
    return check_config(ClassificationConfig, _overridden(plain, data.overrides, where), where)


def _overridden(plain: dict[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{where}: '{text}' is no override; write key=value")
        section: Any = plain
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        try:
            section[last] = json.loads(value)
        except json.JSONDecodeError:
            section[last] = value
    return plain
