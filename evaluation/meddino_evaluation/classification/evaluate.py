"""One backbone on one data set: learn on train and val, open the test once at the very end, write what was found."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.device import Machine, find_machine
from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.data.remote import corpus_location
from meddino_evaluation.adaptation.features import FeatureExtractor, joined, make_transform, slice_hash
from meddino_evaluation.adaptation.few_shot import Draw, few_shot_draws
from meddino_evaluation.adaptation.finetune import ImageBank
from meddino_evaluation.adaptation.protocols import FittedModel, Part, TaskData, check_selection, learn, smaller
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.config import ClassificationConfig, ProtocolName
from meddino_evaluation.classification.datasets import Case, LabelledSet, labels_array
from meddino_evaluation.classification.results import (
    ALL_DATA,
    FORMAT_VERSION,
    Run,
    finite,
    summarise,
    write_metrics,
    write_per_case,
)
from meddino_evaluation.classification.splits import Split, check_contents, load_split, make_splits, save_split

_log = get_logger(__name__)


class SealedTest:
    """The test part: it can be opened once, after everything has been learned."""

    def __init__(self, cases: Sequence[Case], read: Callable[[Sequence[Case]], Part]) -> None:
        self._cases = tuple(cases)
        self._read = read
        self._opened = False

    def open(self) -> Part:
        """Read the test cases.

        Raises:
            RuntimeError: They were read before: a fault of this program, never the user's.
        """
        if self._opened:
            raise RuntimeError("the test part was to be read a second time")
        self._opened = True
        return self._read(self._cases)


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
    machine = find_machine(config.features.device)
    check_selection(config, dataset.kind)
    splits = choose_splits(dataset, config)
    corpus_hashes, corpus_hash = _corpus(config.split.corpus)
    transform = make_transform(backbone, config.features, dataset.config)
    extractor = FeatureExtractor(backbone, transform, config.features, config.features.cache or out / "features", machine)
    bank = ImageBank(backbone, transform)
    runs: list[Run] = []
    notes: list[str] = _standing_notes(dataset, config)
    digests: dict[str, str] = {}
    for split in splits:
        save_split(out / "splits" / f"split-{split.repeat}.json", dataset, split)
        found, seen, contents = _one_split(dataset, split, config, extractor, bank, machine, corpus_hashes, few_shot=few_shot)
        runs += found
        notes += [note for note in seen if note not in notes]
        digests |= contents
    extractor.check_frozen()
    content = _content(dataset, config, extractor, runs, corpus_hash)
    content |= {"splits": [split.origin for split in splits], "notes": notes}
    content["data"]["hash"] = data_hash(dataset, digests)
    write_per_case(out / "per_case.csv", dataset.config.classes, dataset.kind, runs)
    write_metrics(out / "metrics.json", content)
    result: dict[str, Any] = finite(content)
    return result


def _content(
    dataset: LabelledSet, config: ClassificationConfig, extractor: FeatureExtractor, runs: Sequence[Run], corpus: str | None
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
            "corpus_compared": corpus,
        },
        "transform": extractor.transform.__dict__,
        "config": config.model_dump(mode="json"),
        "meddino_version": _version(),
        "results": summarise(dataset.kind, dataset.config.classes, runs, config.statistics, config.split.seed),
    }


def data_hash(dataset: LabelledSet, contents: dict[str, str]) -> str:
    """Return a SHA-256 over ids, patients, labels and image contents of the cases that were used."""
    rows = [[case.id, case.patient, case.label, contents.get(case.id, "")] for case in dataset.cases]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def choose_splits(dataset: LabelledSet, config: ClassificationConfig) -> list[Split]:
    """Return the split that a file gives, once a repeat, or the splits drawn by patient."""
    if config.split.file is not None:
        return [load_split(config.split.file, dataset, repeat) for repeat in range(config.split.repeats)]
    return make_splits(
        dataset,
        repeats=config.split.repeats,
        val_fraction=config.split.val_fraction,
        test_fraction=config.split.test_fraction,
        seed=config.split.seed,
    )


def _corpus(root: str | None) -> tuple[frozenset[str], str | None]:
    if root is None:
        return frozenset(), None
    corpus = Corpus(corpus_location(root))
    _log.info("comparing with %d slices of the pretraining corpus %s", len(corpus), root)
    return frozenset(slice_hash(corpus.read(number)) for number in range(len(corpus))), corpus.content_hash


def _standing_notes(dataset: LabelledSet, config: ClassificationConfig) -> list[str]:
    notes = []
    if not dataset.has_patients:
        notes.append("the data set names no patients: images of one patient may stand on both sides of a split")
    if config.split.corpus is None:
        notes.append("not compared with a pretraining corpus (split.corpus)")
    return notes


def _one_split(
    dataset: LabelledSet,
    split: Split,
    config: ClassificationConfig,
    extractor: FeatureExtractor,
    bank: ImageBank,
    machine: Machine,
    corpus_hashes: frozenset[str],
    *,
    few_shot: bool,
) -> tuple[list[Run], list[str], dict[str, str]]:
    by_id = {case.id: case for case in dataset.cases}

    def read(cases: Sequence[Case]) -> Part:
        return Part(tuple(cases), extractor(cases))

    train = read([by_id[name] for name in split.train])
    val = read([by_id[name] for name in split.val])
    sealed = SealedTest([by_id[name] for name in split.test], read)
    seed = derive_seed(config.split.seed, "repeat", split.repeat) % 2**31
    task = TaskData(
        train, val, not few_shot, dataset.kind, dataset.config.classes, config, seed, extractor.backbone, bank, machine
    )
    learned = [(plan, *_timed(_task(task, plan), plan.protocol)) for plan in _plans(task, few_shot)]
    # Nothing is learned or chosen below this line.
    test = sealed.open()
    everything = joined(joined(train.table, val.table), test.table)
    contents = dict(zip(everything.ids, everything.hashes, strict=True))
    overlap = check_contents(dataset, split, contents, corpus_hashes)
    if overlap and not config.split.allow_pretraining_overlap:
        raise ConfigError(
            f"data set {dataset.config.name}: {'; '.join(overlap)}. Take them out of the corpus, or set "
            "split.allow_pretraining_overlap=true: every table then says so"
        )
    runs = [_tested(plan, result, seconds, test, split, task) for plan, result, seconds in learned]
    return runs, overlap, {name: hashlib.sha256("".join(hashes).encode()).hexdigest() for name, hashes in contents.items()}


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
        split.repeat,
        draw.number if draw else 0,
        tuple(case.id for case in test.cases),
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
