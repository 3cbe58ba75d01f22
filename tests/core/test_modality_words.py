"""Hounsfield units are one modality's: what serves all of them does not speak of HU."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def _of_hu(path: Path) -> list[str]:
    names = set(_names(ast.parse(path.read_text())))
    return sorted(name for name in names if HU.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)))


@pytest.fixture(scope="module")
def speaking() -> dict[str, list[str]]:
    """Names that speak of HU, by file."""
    packages = ("meddino", "pretrain", "data_curation", "evaluation", "slurm")
    files = [path for package in packages for path in sorted((PROJECT / package).rglob("*.py"))]
    return {path.relative_to(PROJECT).as_posix(): names for path in files if (names := _of_hu(path))}


def test_names__only_what_is_about_ct_speaks_of_hu(speaking):
    wrong = {place: names for place, names in speaking.items() if not place.startswith(tuple(CT))}
    assert not wrong, wrong


def test_ct__every_exception_is_one(speaking):
    assert not [place for place in CT if not any(path.startswith(place) for path in speaking)]
