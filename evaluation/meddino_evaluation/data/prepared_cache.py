"""Prepared cases kept on disk as Blosc2: read slice by slice, found again by the bytes of their files and the grid."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import blosc2

from meddino.core.files import atomic_directory, canonical_json
from meddino.volumes.dicom.structures import structure_names
from meddino.volumes.orientation import Turn
from meddino_evaluation.data.case import LabelMapCase
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.data.prepare import MAX_NARROW_LABEL, GridRule, PreparedCase, prepare_case

VERSION = 2


def prepare_cached(
    dataset: LabelledDataset, case: LabelMapCase, channels: Sequence[int], rule: GridRule, folder: Path | None
) -> PreparedCase:
    """Prepare a case, or open what an earlier run has prepared of the same files.

    Args:
        dataset: Reads the files.
        case: Which one.
        channels: Image channels to keep.
        rule: In-plane grid.
        folder: Where prepared cases lie; None keeps them in memory only.
    """
    if folder is None:
        return prepare_case(dataset, case, channels, rule)
    place = folder / f"{case.name}-{_key(dataset, case, channels, rule)}"
    if not (place / "case.json").is_file():
        prepared = prepare_case(dataset, case, channels, rule)
        if prepared.labels is None:
            return prepared
        with atomic_directory(place) as partial:
            prepared.images.save(str(partial / "images.b2nd"), mode="w")
            prepared.labels.save(str(partial / "labels.b2nd"), mode="w")
            notes = {
                "present": [sorted(values) for values in prepared.present],
                "turn": asdict(prepared.turn),
                "source_plane": prepared.source_plane,
                "spacing_mm": prepared.spacing_mm,
                "content_hash": prepared.content_hash,
            }
            (partial / "case.json").write_text(canonical_json(notes), encoding="utf-8")
    return _open(place, case, dataset)


def _open(place: Path, case: LabelMapCase, dataset: LabelledDataset) -> PreparedCase:
    notes = json.loads((place / "case.json").read_text(encoding="utf-8"))
    (a, b, c), (d, e, f) = notes["turn"]["order"], notes["turn"]["flips"]
    rows, cols = notes["source_plane"]
    z, y, x = notes["spacing_mm"]
    return PreparedCase(
        case.name,
        blosc2.open(str(place / "images.b2nd"), mode="r", dparams={"nthreads": 1}),
        blosc2.open(str(place / "labels.b2nd"), mode="r", dparams={"nthreads": 1}),
        tuple(frozenset(values) for values in notes["present"]),
        dataset.geometry(case),
        Turn((a, b, c), (d, e, f)),
        (rows, cols),
        (z, y, x),
        notes["content_hash"],
        dataset.modality,
    )


def _key(dataset: LabelledDataset, case: LabelMapCase, channels: Sequence[int], rule: GridRule) -> str:
    parts = {
        "version": VERSION,
        "files": [dataset.file_hash(path) for path in dataset.files(case, channels)],
        "label": dataset.file_hash(case.label) if case.label else None,
        "labels": sorted(dataset.labels.allowed),
        "ignore": dataset.labels.ignore,
        "as_background": dataset.labels.as_background,
        "rule": asdict(rule),
    } | ({} if dataset.modality == "ct" else {"modality": dataset.modality})
    if max(dataset.labels.allowed) > MAX_NARROW_LABEL:
        parts["stored"] = "int32"  # what was kept as int16 before held other values
    if case.label is not None and structure_names(case.label) is not None:
        parts["names"] = dataset.labels.names  # structures are found by their names, label maps by their values
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:20]
