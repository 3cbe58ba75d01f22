"""One backbone on one data set: learn on train and val, open the test once at the very end, write what was found."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.device import Machine, find_machine
from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino_evaluation.adaptation.config import ProtocolName
from meddino_evaluation.adaptation.features import FeatureExtractor, make_transform
from meddino_evaluation.adaptation.few_shot import Draw, few_shot_draws
from meddino_evaluation.adaptation.finetune import ImageBank
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.config import ClassificationConfig
from meddino_evaluation.classification.datasets import LabelledSet
from meddino_evaluation.classification.protocols import FittedModel, Part, TaskData, check_selection, learn, smaller
from meddino_evaluation.classification.results import (
    ALL_DATA,
    FORMAT_VERSION,
    Run,
    finite,
    summarise,
    write_metrics,
    write_per_case,
)
from meddino_evaluation.data.case import ClassCase, a_few, doubtful_patients, labels_array
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.data.splits import (
    SealedTest,
    Split,
    absent_classes,
    check_twins,
    draw_splits,
    left_out,
    load_split,
    save_split,
)

_log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """One thing to learn.

    Attributes:
        protocol: Its name.
        draw: The few patients to learn from; None for the whole training part.
    """

    protocol: ProtocolName
    draw: Draw | None


def evaluate(
    backbone: Backbone, dataset: LabelledSet, config: ClassificationConfig, out: Path, *, few_shot: bool = False
) -> dict[str, Any]:
    """Run the protocols of a configuration, and write per_case.csv, metrics.json and the splits.

    Args:
        backbone: As loaded; stays as it is.
        dataset: Found on disk.
        config: Everything else.
        out: Folder of the results.
        few_shot: Learn from few patients with the protocols of `few_shot`, instead of from all with `protocols`.

    Returns:
        The content of metrics.json.

    Raises:
        ConfigError: The split, an overlap or a setting is refused.
        VolumeError: An image cannot be used.
    """
    refuse_files_of_others(out, ("per_case.csv", "metrics.json", "report.html"))
    machine = find_machine(config.features.device)
    check_selection(config, dataset.kind)
    splits = choose_splits(dataset, config)
    leakage = LeakageCheck(backbone.lineage, config.split.corpus, backbone.spec, slices=True)
    transform = make_transform(backbone, config.features, dataset.config)
    extractor = FeatureExtractor(backbone, transform, config.features, config.features.cache or out / "features", machine)
    bank = ImageBank(backbone, transform)
    runs: list[Run] = []
    notes: list[str] = _standing_notes(dataset, splits, leakage)
    digests: dict[str, str] = {}
    write_settings(out, config)
    for split in splits:
        save_split(out / "splits" / f"split-{split.number}.json", dataset.config.name, split)
        found, seen, contents = _one_split(dataset, split, config, extractor, bank, machine, leakage, few_shot=few_shot)
        runs += found
        notes += [note for note in seen if note not in notes]
        digests |= contents
    extractor.check_frozen()
    notes += _told(dataset, contradictions(dataset, digests))
    content = _content(dataset, config, extractor, runs, leakage)
    notes += _told(dataset, extractor.notes.lines())
    content |= {"splits": [split.origin for split in splits], "notes": notes}
    content["data"]["hash"] = data_hash(dataset, digests)
    write_per_case(out / "per_case.csv", dataset.config.classes, dataset.kind, runs)
    write_metrics(out / "metrics.json", content)
    result: dict[str, Any] = finite(content)
    return result


def _content(
    dataset: LabelledSet, config: ClassificationConfig, extractor: FeatureExtractor, runs: Sequence[Run], leakage: LeakageCheck
) -> dict[str, Any]:
    """Return what metrics.json says of model, data, settings and results."""
    backbone = extractor.backbone
    return {
        "format": "meddino-classification",
        "version": FORMAT_VERSION,
        "model": {
            "name": backbone.name,
            "hash": extractor.model_hash,
            "embed_dim": backbone.embed_dim,
            "parameters": _parameters(backbone),
        },
        "data": {
            "name": dataset.config.name,
            "task": dataset.kind,
            "classes": dataset.config.classes,
            "cases": len(dataset.cases),
            "patients": len({case.patient for case in dataset.cases}),
            "patients_known": dataset.has_patients,
            "licence": dataset.config.licence,
            "split_rule": dataset.config.split_rule,
        },
        "leakage": leakage.summary(),
        "transform": extractor.transform.__dict__,
        "config": config.model_dump(mode="json"),
        "meddino_version": _version(),
        "results": summarise(dataset.kind, dataset.config.classes, runs, config.statistics, config.split.seed),
    }


def data_hash(dataset: LabelledSet, contents: dict[str, str]) -> str:
    """Return a SHA-256 over ids, patients, labels and image contents of the cases that were used."""
    rows = [[case.name, case.patient, case.label, contents.get(case.name, "")] for case in dataset.cases]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def choose_splits(dataset: LabelledSet, config: ClassificationConfig) -> list[Split]:
    """Return the split that a file gives, once a repeat, or the splits drawn by patient.

    Raises:
        ConfigError: A split is refused (see `check_split`), or train lacks a class; names it.
    """
    where, settings = f"data set {dataset.config.name}", config.split
    if settings.file is not None:
        splits = [load_split(settings.file, dataset.cases, where, repeat) for repeat in range(settings.repeats)]
    else:
        fractions = {"val_fraction": settings.val_fraction, "test_fraction": settings.test_fraction}
        splits = draw_splits(dataset.cases, where, repeats=settings.repeats, seed=settings.seed, **fractions)
    lost = left_out(dataset.cases, splits)
    if lost:
        _log.warning("%s: %s", where, lost)
    by_name = {case.name: case for case in dataset.cases}
    for split in splits:
        absent = absent_classes([by_name[name] for name in split.train], len(dataset.config.classes))
        if absent:
            raise ConfigError(
                f"{where}: no training case of class {', '.join(dataset.config.classes[one] for one in absent)}; nothing could "
                "learn it: give another split or seed, or leave the class out"
            )
    return splits


def _standing_notes(dataset: LabelledSet, splits: Sequence[Split], leakage: LeakageCheck) -> list[str]:
    lost = left_out(dataset.cases, splits)
    told = doubtful_patients(dataset.cases) if dataset.has_patients else []
    if not dataset.has_patients:
        told.append("the data set names no patients: images of one patient may stand on both sides of a split")
    by_name, classes = {case.name: case for case in dataset.cases}, dataset.config.classes
    absent = {one for split in splits for one in absent_classes([by_name[name] for name in split.test], len(classes))}
    if absent:
        found = ", ".join(classes[one] for one in sorted(absent))
        told.append(f"not every test part has a case of class {found}: where there is none, means are over the other classes")
    notes = [*([lost] if lost else []), *_told(dataset, told)]
    if not leakage.known:
        notes.append("not compared with a pretraining corpus: give split.corpus, or an export with its list of volumes")
    return notes


def contradictions(dataset: LabelledSet, digests: Mapping[str, str]) -> list[str]:
    """Return a note on images that are there twice with different labels; `digests` has the content of each case."""
    alike: dict[str, list[ClassCase]] = {}
    for case in dataset.cases:
        if case.name in digests:
            alike.setdefault(digests[case.name], []).append(case)
    pairs = [" and ".join(case.name for case in same) for same in alike.values() if len({case.label for case in same}) > 1]
    return [f"{len(pairs)} images are there more than once with different labels: {a_few(pairs)}"] if pairs else []


def _told(dataset: LabelledSet, notes: Sequence[str]) -> Sequence[str]:
    """Say notes in the log too, and return them."""
    for note in notes:
        _log.warning("data set %s: %s", dataset.config.name, note)
    return notes


def _one_split(
    dataset: LabelledSet,
    split: Split,
    config: ClassificationConfig,
    extractor: FeatureExtractor,
    bank: ImageBank,
    machine: Machine,
    leakage: LeakageCheck,
    *,
    few_shot: bool,
) -> tuple[list[Run], list[str], dict[str, str]]:
    by_id = {case.name: case for case in dataset.cases}

    def read(cases: Sequence[ClassCase]) -> Part:
        return Part(tuple(cases), extractor(cases))

    train = read([by_id[name] for name in split.train])
    val = read([by_id[name] for name in split.val])
    sealed = SealedTest([by_id[name] for name in split.test], read)
    seed = derive_seed(config.split.seed, "repeat", split.number) % 2**31
    task = TaskData(
        train, val, not few_shot, dataset.kind, dataset.config.classes, config, seed, extractor.backbone, bank, machine
    )
    learned = [(plan, *_timed(_task(task, plan), plan.protocol)) for plan in _plans(task, few_shot)]
    # Nothing is learned or chosen below this line.
    test = sealed.open()
    hashes = {name: extractor.slice_hashes[name] for names in split.parts().values() for name in names}
    check_twins(split, hashes, f"data set {dataset.config.name}")
    overlap = _overlap(split, extractor.content_hashes, leakage)
    if overlap and not config.split.allow_pretraining_overlap:
        raise ConfigError(
            f"data set {dataset.config.name}: {'; '.join(overlap)}. Take them out of the corpus, or set "
            "split.allow_pretraining_overlap=true: every table then says so"
        )
    runs = [_tested(plan, result, seconds, test, split, task) for plan, result, seconds in learned]
    return runs, overlap, {name: hashlib.sha256("".join(own).encode()).hexdigest() for name, own in hashes.items()}


def _overlap(split: Split, contents: Mapping[str, tuple[str, ...]], leakage: LeakageCheck) -> list[str]:
    """Return a line for each part that holds volumes of the pretraining corpus."""
    lines = []
    for part, names in split.parts().items():
        seen = [name for name in names if name in contents and leakage.look(name, *contents[name])]
        if seen:
            lines.append(
                f"{len(seen)} of {len(names)} {part} cases were seen (without labels) in pretraining: {', '.join(seen[:3])}"
            )
    return lines


def _plans(task: TaskData, few_shot: bool) -> list[Plan]:
    if not few_shot:
        return [Plan(protocol, None) for protocol in task.config.protocols]
    settings = task.config.few_shot
    draws = few_shot_draws(task.train.cases, task.kind, len(task.classes), settings, task.seed)
    return [Plan(protocol, draw) for protocol in settings.protocols for draw in draws]


def _task(task: TaskData, plan: Plan) -> TaskData:
    if plan.draw is None:
        return task
    return smaller(task, plan.draw.places, derive_seed(task.seed, plan.draw.setting, plan.draw.number) % 2**31)


def _timed(task: TaskData, protocol: ProtocolName) -> tuple[FittedModel, float]:
    start = time.monotonic()
    learned = learn(protocol, task)
    seconds = time.monotonic() - start
    _log.info("%s: %d cases, %.1f s, chose %s", protocol, len(task.train.cases), seconds, learned.chosen)
    return learned, seconds


def _tested(plan: Plan, learned: FittedModel, seconds: float, test: Part, split: Split, task: TaskData) -> Run:
    draw = plan.draw
    return Run(
        plan.protocol,
        draw.setting if draw else ALL_DATA,
        split.number,
        draw.number if draw else 0,
        tuple(case.name for case in test.cases),
        tuple(case.patient for case in test.cases),
        labels_array(test.cases),
        learned.predict(test),
        learned.chosen,
        learned.candidates,
        len(draw.places) if draw else len(task.train.cases),
        seconds,
    )


def _parameters(backbone: Backbone) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def _version() -> str:
    from importlib.metadata import version

    return version("meddino")
