"""Hounsfield units are one modality's: what serves all of them does not speak of HU."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from meddino.data.intensity import MODALITIES

PROJECT = Path(__file__).resolve().parents[2]
HU = re.compile(r"(^|_)hu(_|$)|hounsfield", re.IGNORECASE)

# What is about CT alone, each with the reason.
CT = {
    "meddino/data/intensity.py": "the member",
    "meddino/data/model_input.py": "how it is normalised and shown",
    "meddino/volumes/": "what DICOM's rescale makes of stored values, and air outside a CT volume",
    "pretrain/meddino_pretrain/data/augmentations.py": "random windows",
    "pretrain/meddino_pretrain/data/config.py": "CTAugment",
    "pretrain/meddino_pretrain/monitoring/fixed_slices.py": "the window of the second view",
    "data_curation/meddino_data_curation/phantom/": "makes CT",
    "data_curation/meddino_data_curation/config.py": "HounsfieldConfig, and one limit of slices",
    "data_curation/meddino_data_curation/selection/": "recognition of CT, its air, its body, its look",
    "data_curation/meddino_data_curation/corpus/report": "the histogram of CT",
    "data_curation/meddino_data_curation/corpus/show.py": "the window of contact sheets",
    "data_curation/meddino_data_curation/corpus/thumbnails.py": "the soft-tissue window, which others are scaled to",
    "data_curation/meddino_data_curation/changes/revision.py": "the histogram of CT",
    "evaluation/meddino_evaluation/classification/dataset_config.py": "the window of a CT data set",
    "evaluation/meddino_evaluation/classification/recognise.py": "recognition of CT",
    "evaluation/meddino_evaluation/adaptation/features.py": "the window of a CT data set",
    "evaluation/meddino_evaluation/detection/config.py": "the window of a CT data set",
    "evaluation/meddino_evaluation/detection/dataset.py": "the window of a CT data set",
    "evaluation/meddino_evaluation/visualization/": "the window of a CT data set",
    "evaluation/meddino_evaluation/data/fingerprint.py": "nnU-Net's normalisation of CT",
    "evaluation/meddino_evaluation/nnunet/": "nnU-Net's normalisation of CT",
}

# Where a modality has its row; a list of them elsewhere would forget the next one.
ROWS = {
    "meddino/data/intensity.py",
    "pretrain/meddino_pretrain/data/augmentations.py",
    "pretrain/meddino_pretrain/data/config.py",
}


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def _of_hu(tree: ast.AST) -> list[str]:
    names = set(_names(tree))
    return sorted(name for name in names if HU.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)))


def _lists_modalities(node: ast.AST) -> bool:
    match node:
        case ast.Dict(keys=items) | ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            words = {item.value if isinstance(item, ast.Constant) else None for item in items}
            return words <= {*MODALITIES, "auto"} and len(words & {*MODALITIES}) > 1
    return False


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    packages = ("meddino", "pretrain", "data_curation", "evaluation", "slurm")
    files = [path for package in packages for path in sorted((PROJECT / package).rglob("*.py"))]
    return {path.relative_to(PROJECT).as_posix(): ast.parse(path.read_text()) for path in files}


@pytest.fixture(scope="module")
def speaking(trees) -> dict[str, list[str]]:
    """Names that speak of HU, by file."""
    return {place: names for place, tree in trees.items() if (names := _of_hu(tree))}


def test_names__only_what_is_about_ct_speaks_of_hu(speaking):
    wrong = {place: names for place, names in speaking.items() if not place.startswith(tuple(CT))}
    assert not wrong, wrong


def test_ct__every_exception_is_one(speaking):
    assert not [place for place in CT if not any(path.startswith(place) for path in speaking)]


def test_modalities__are_listed_where_they_have_a_row_alone(trees):
    assert {place for place, tree in trees.items() if any(map(_lists_modalities, ast.walk(tree)))} == ROWS
