"""One detector on one data set: learn and choose on train and val, look at the test once, write what was found."""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import meddino
from meddino.core.device import find_machine
from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write, canonical_json
from meddino.core.logging import get_logger
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.results import finite, write_metrics
from meddino_evaluation.data.case import doubtful_patients
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
from meddino_evaluation.detection.config import DetectConfig
from meddino_evaluation.detection.dataset import DetectionSet, Pictures
from meddino_evaluation.detection.metrics import ImageResult, summarise
from meddino_evaluation.detection.readers import BoxCase
from meddino_evaluation.detection.training import Learning, find_boxes, fit_detector

_log = get_logger(__name__)
COLUMNS = ("repeat", "image", "patient", "kind", "label", "score", "x1", "y1", "x2", "y2")
PER_CASE = "per_case.csv"
OVERFIT = (
    "trained, chosen and tested on the same images (overfit=true): this shows that the detector can learn, and is no result"
)


def detect(backbone: Backbone, dataset: DetectionSet, config: DetectConfig, out: Path) -> dict[str, Any]:
    """Train and test a detector on each split, and write per_case.csv, metrics.json, weights and splits.

    Args:
        backbone: As loaded; each training loads it anew.
        dataset: Found on disk.
        config: Everything else.
        out: Folder of the results.

    Returns:
        The content of metrics.json.

    Raises:
        ConfigError: The split, an overlap, a box or a setting is refused.
        VolumeError: An image cannot be used.
    """
    refuse_files_of_others(out, (PER_CASE, "metrics.json", "report.html"))
    machine = find_machine(config.device, config.precision)
    splits = choose_splits(dataset, config)
    by_name = {case.name: case for case in dataset.cases}
    leakage = LeakageCheck(backbone.lineage, config.split.corpus, backbone.spec, slices=True)
    pictures = Pictures(backbone, dataset, config.data)
    hashes = pictures.check(dataset.cases)
    notes = _notes(backbone, dataset, config, splits, pictures, leakage)
    for split in splits if not config.overfit else ():
        check_twins(split, {name: (one,) for name, one in hashes.items()}, f"data set {dataset.name}")
    notes += _overlap(dataset, config, pictures, leakage)
    learning = Learning(backbone.spec or backbone.name, backbone.hash(), config, dataset.classes, pictures, machine, hashes)
    runs = []
    write_settings(out, config)
    for split in splits:
        save_split(out / "splits" / f"split-{split.number}.json", dataset.name, split)
        train, val = ([by_name[name] for name in names] for names in (split.train, split.val))
        sealed = SealedTest([by_name[name] for name in split.test], list[BoxCase])
        _log.info(
            "repeat %d: %d images to learn from, %d to choose by, %d to test",
            split.number,
            len(train),
            len(val),
            len(split.test),
        )
        detector = fit_detector(learning, split, train, val, out)
        # Nothing is learned or chosen below this line.
        runs.append(find_boxes(detector, learning, sealed.open()))
    write_per_case(out / PER_CASE, dataset.classes, runs)
    content = _content(backbone, learning, dataset, splits, leakage)
    found = summarise(read_per_case(out / PER_CASE, dataset.classes), dataset.classes, config.metrics, config.split.seed)
    content |= {**found, "notes": [*notes, *found["notes"]]}
    content["headline"] = {"metric": "ap50", **{key: found["metrics"]["ap50"][key] for key in ("mean", "std", "low", "high")}}
    write_metrics(out / "metrics.json", content)
    result: dict[str, Any] = finite(content)
    return result


def choose_splits(dataset: DetectionSet, config: DetectConfig) -> list[Split]:
    """Return the splits of a run.

    Raises:
        ConfigError: A part is empty or lacks a class, a patient stands on two sides; names them.
    """
    settings, where = config.split, f"data set {dataset.name}"
    cases = [case.with_classes(dataset.classes) for case in dataset.cases]
    if config.overfit:
        names = tuple(case.name for case in dataset.cases)
        return [Split(repeat, names, names, names, "overfit: the same images everywhere") for repeat in range(settings.repeats)]
    if settings.file is not None:
        splits = [load_split(settings.file, cases, where, repeat) for repeat in range(settings.repeats)]
    else:
        fractions = {"val_fraction": settings.val_fraction, "test_fraction": settings.test_fraction}
        splits = draw_splits(cases, where, repeats=settings.repeats, seed=settings.seed, **fractions)
    by_name = {case.name: case for case in cases}
    for split in splits:
        absent = absent_classes([by_name[name] for name in split.train], len(dataset.classes))
        if absent:
            lacking = ", ".join(dataset.classes[one] for one in absent)
            raise ConfigError(
                f"{where}, split {split.number}: no training image has a box of class {lacking}; nothing could learn it: give "
                "another split or seed, or leave the class out (data.classes)"
            )
    return splits


def write_per_case(path: Path, classes: Sequence[str], runs: Sequence[Sequence[ImageResult]]) -> None:
    """Write a row an image, a row a box and a row a detection; every number of metrics.json can be recomputed from them."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, run in enumerate(runs):
            for one in run:
                first = (number, one.name, one.patient)
                writer.writerow((*first, "image", "", "", "", "", "", ""))
                writer.writerows(
                    (*first, "box", classes[label - 1], "", *(repr(float(value)) for value in box))
                    for box, label in zip(one.boxes, one.labels, strict=True)
                )
                writer.writerows(
                    (*first, "detection", classes[label - 1], repr(float(score)), *(repr(float(value)) for value in box))
                    for box, label, score in zip(one.found, one.found_labels, one.scores, strict=True)
                )


def read_per_case(path: Path, classes: Sequence[str]) -> list[list[ImageResult]]:
    """Read what `write_per_case` wrote."""
    rows: dict[tuple[int, str, str], dict[str, list[tuple[int, float, list[float]]]]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            own = rows.setdefault((int(row["repeat"]), row["image"], row["patient"]), {"box": [], "detection": []})
            if row["kind"] != "image":
                box = [float(row[key]) for key in ("x1", "y1", "x2", "y2")]
                own[row["kind"]].append((classes.index(row["label"]) + 1, float(row["score"] or 1), box))
    runs: list[list[ImageResult]] = [[] for _ in range(1 + max(number for number, _, _ in rows))]
    for (number, name, patient), own in rows.items():
        labels, scores, boxes = ([_column(own[kind], place) for kind in ("box", "detection")] for place in range(3))
        truth, found = (np.array(one, dtype=np.float64).reshape(-1, 4) for one in boxes)
        numbers, found_numbers = (np.array(one, dtype=np.int64) for one in labels)
        runs[number].append(
            ImageResult(name, patient, truth, numbers, found, found_numbers, np.array(scores[1], dtype=np.float64))
        )
    return runs


def _column(rows: Sequence[tuple[Any, ...]], place: int) -> list[Any]:
    return [row[place] for row in rows]


def _notes(
    backbone: Backbone,
    dataset: DetectionSet,
    config: DetectConfig,
    splits: Sequence[Split],
    pictures: Pictures,
    leakage: LeakageCheck,
) -> list[str]:
    notes = [OVERFIT] if config.overfit else []
    notes += dataset.notes
    cases = [case.with_classes(dataset.classes) for case in dataset.cases]
    notes += doubtful_patients(cases) if dataset.has_patients else []
    lost = left_out(cases, splits)
    notes += [lost] if lost else []
    mismatch = backbone.contract.mismatch(dataset.modality, f"model {backbone.name} on {dataset.name}")
    if mismatch:
        notes.append(f"{mismatch}; they are scaled to its range")
    if pictures.cut:
        notes.append(
            f"{len(pictures.cut)} images have boxes that stood out by up to a pixel, and were cut: {sorted(pictures.cut)[:3]}"
        )
    notes += pictures.notes.lines()
    if not leakage.known:
        notes.append("not compared with a pretraining corpus: give split.corpus, or an export with its list of volumes")
    for note in notes:
        _log.warning("%s", note)
    return notes


def _overlap(dataset: DetectionSet, config: DetectConfig, pictures: Pictures, leakage: LeakageCheck) -> list[str]:
    seen = [case.name for case in dataset.cases if leakage.look(case.name, *pictures.contents.get(case.name, ()))]
    if not seen:
        return []
    line = f"{len(seen)} of {len(dataset.cases)} images were seen (without boxes) in pretraining: {', '.join(seen[:3])}"
    if not config.split.allow_pretraining_overlap:
        raise ConfigError(
            f"data set {dataset.name}: {line}. Take them out of the corpus, or set split.allow_pretraining_overlap=true: every "
            "table then says so"
        )
    return [line]


def _content(
    backbone: Backbone, learning: Learning, dataset: DetectionSet, splits: Sequence[Split], leakage: LeakageCheck
) -> dict[str, Any]:
    """Return what metrics.json says of model, data and settings."""
    boxes = Counter(name for case in dataset.cases for name in case.names)
    what = [(one.name, one.patient, learning.hashes[one.name], one.boxes.tolist(), one.names) for one in dataset.cases]
    return {
        "format": "meddino-detection",
        "version": 1,
        "model": {
            "name": backbone.name,
            "hash": learning.model_hash,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        },
        "data": {
            "name": dataset.name,
            "classes": dataset.classes,
            "cases": len(dataset.cases),
            "patients": len({case.patient for case in dataset.cases}),
            "patients_known": dataset.has_patients,
            "boxes": {name: boxes[name] for name in dataset.classes},
            "licence": dataset.licence,
            "split_rule": dataset.split_rule,
            "hash": hashlib.sha256(canonical_json(what).encode()).hexdigest(),
        },
        "overfit": learning.config.overfit,
        "leakage": leakage.summary(),
        "splits": [split.origin for split in splits],
        "config": learning.config.model_dump(mode="json"),
        "meddino_version": meddino.__version__,
    }
