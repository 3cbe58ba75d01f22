"""The jobs of a classification study: models x data sets x protocols."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meddino.core.config import check_config
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import canonical_json, sha256_file, write_json
from meddino.volumes.pictures import split_source
from meddino_evaluation.adaptation.config import ProtocolName
from meddino_evaluation.backbones.load import load_backbone, model_name, named_model
from meddino_evaluation.classification.config import ClassificationConfig
from meddino_evaluation.classification.evaluate import evaluate
from meddino_evaluation.classification.recognise import open_labelled
from meddino_evaluation.study.config import StudyConfig, StudyData
from meddino_evaluation.study.jobs import weights_hash

StudyKind = Literal["compare", "freeze", "few-shot"]
FEW_SHOT = "few-shot"


@dataclass(frozen=True)
class ClassificationJob:
    """One model, one data set, one protocol.

    Attributes:
        model: As `load_backbone` takes it.
        dataset: Name or file of the definition.
        root: Its folder.
        protocol: What to run.
        few_shot: On few patients.
        evaluation: All settings.
        weights: Hash of the model's weights, where they lie in a file or folder.
        cases: Hash of the data set's cases and of how they are divided (see `cases_hash`), where it can be opened.
    """

    model: str
    dataset: str
    root: Path
    protocol: ProtocolName
    few_shot: bool
    evaluation: ClassificationConfig
    weights: str | None = None
    cases: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one whenever anything about the job is different."""
        settings = self.evaluation.model_dump(mode="json")
        settings["features"]["cache"] = settings["features"]["device"] = None  # where and on what does not matter
        what = [self.model, self.weights, self.dataset, str(self.root), self.cases, self.protocol, self.few_shot, settings]
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:10]
        names = [re.sub(r"[^A-Za-z0-9]+", "_", Path(one).name).strip("_") for one in (named_model(self.model)[0], self.dataset)]
        return "-".join([*names, self.protocol, *(["few_shot"] if self.few_shot else []), digest])

    @property
    def title(self) -> str:
        """For people."""
        few = " on few patients" if self.few_shot else ""
        return f"{model_name(self.model)}, {self.protocol}{few}, on {Path(self.dataset).stem}"

    def run(self, folder: Path) -> None:
        """Learn and test."""
        dataset = open_labelled(self.dataset, self.root)
        backbone = load_backbone(self.model)
        write_json(folder / "job.json", {"model": self.model, "dataset": self.dataset, "protocol": self.protocol})
        evaluate(backbone, dataset, self.evaluation, folder, few_shot=self.few_shot)


def list_jobs(
    kind: StudyKind, config: StudyConfig, out: Path, model: str | None = None, data_root: Path | None = None
) -> list[ClassificationJob]:
    """Return all jobs of a study, in an order that does not depend on what is done already.

    Args:
        kind: Which study.
        config: What it compares.
        out: Folder of the study, for the feature cache.
        model: What `{model}` stands for.
        data_root: Data folders are below it.

    Raises:
        ConfigError: `{model}` occurs and no model was given, two models have one name, or an override is wrong.
    """
    if model is None and any("{model}" in one for one in config.models):
        raise ConfigError("the study's models contain {model}: name the export with --model")
    models = [one.replace("{model}", model or "") for one in config.models]
    named: dict[str, str] = {}
    for one in models:
        if (other := named.setdefault(model_name(one), one)) != one:
            raise ConfigError(
                f"the study's models {other} and {one} are both '{model_name(one)}' in its tables: write NAME=MODEL"
            )
    protocols = _protocols(kind, config)
    weights = {name: weights_hash(name) for name in models}
    jobs = []
    for data in config.data:
        root = Path(data.root) if data_root is None else data_root / data.root
        settings = {protocol: _settings(config, data, protocol, kind, out) for protocol in protocols}
        cases = cases_hash(data.dataset, root, settings[protocols[0]].split.file)
        for name in models:
            for protocol in protocols:
                what = (protocol, kind == FEW_SHOT, settings[protocol], weights[name], cases)
                jobs.append(ClassificationJob(name, data.dataset, root, *what))
    return jobs


def cases_hash(dataset: str, root: Path, split: Path | None = None) -> str | None:
    """Return a hash of a data set's definition, of who is in it with which label and in which part, and of its files' lengths.

    Changed data are other jobs. Pixels are not read for it: a picture that is changed and keeps its length is not noticed.

    Args:
        dataset: Name or file of the definition.
        root: Folder of the data.
        split: A split's file, whose content is hashed.
    """
    try:
        opened = open_labelled(dataset, root)
    except MedDINOError:
        return None  # its jobs will say why
    files = [split_source(case.source)[0] for case in opened.cases]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    rows = [[case.name, case.patient, case.label, case.split, size] for case, size in zip(opened.cases, sizes, strict=True)]
    division = sha256_file(split) if split is not None and split.is_file() else None
    return hashlib.sha256(canonical_json([opened.config.model_dump(mode="json"), division, rows]).encode()).hexdigest()


def load_results(jobs: Sequence[ClassificationJob], out: Path) -> list[tuple[ClassificationJob, dict[str, Any]]]:
    """Return what the finished jobs found."""
    found = []
    for job in jobs:
        path = out / "jobs" / job.folder / "metrics.json"
        if path.is_file():
            found.append((job, json.loads(path.read_text(encoding="utf-8"))))
    return found


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
