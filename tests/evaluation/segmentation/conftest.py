"""A tiny labelled data set on disk and a config that runs on it in seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.segmentation.config import SegmentConfig

from meddino.core.config import check_config

MakeDataset = Callable[..., Path]


def write_volume(path: Path, array: np.ndarray, spacing=(3.0, 1.5, 1.5), direction=None, origin=(1.0, -2.0, 3.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(float(s) for s in spacing[::-1]))
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(tuple(float(v) for v in np.asarray(direction).reshape(-1)))
    sitk.WriteImage(image, str(path), True)


def blob_case(rng: np.random.Generator, shape=(4, 40, 36)) -> tuple[np.ndarray, np.ndarray]:
    """Air, a body of 0 HU, a bright ball (label 1) and a dark ball (label 2) that are easy to tell apart."""
    _, y, x = np.meshgrid(*(np.arange(s) for s in shape), indexing="ij")
    image = np.full(shape, -1000.0)
    image[((y - shape[1] / 2) ** 2 + (x - shape[2] / 2) ** 2) < (0.45 * shape[1]) ** 2] = 0
    label = np.zeros(shape, dtype=np.uint8)
    for value, hu, corner in ((1, 300.0, 0.33), (2, -400.0, 0.62)):
        cy, cx = shape[1] * corner + rng.uniform(-2, 2), shape[2] * corner + rng.uniform(-2, 2)
        ball = (y - cy) ** 2 + (x - cx) ** 2 < 5**2
        image[ball], label[ball] = hu, value
    return (image + rng.normal(0, 10, shape)).astype(np.int16), label


def write_dataset(root: Path, cases: int = 4, labels: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a data set in nnU-Net's raw layout."""
    for number in range(cases):
        image, label = blob_case(np.random.default_rng(number))
        write_volume(root / "imagesTr" / f"case_{number:02d}_0000.nii.gz", image, **options)
        write_volume(root / "labelsTr" / f"case_{number:02d}.nii.gz", label, **options)
    content = {
        "channel_names": {"0": "CT"},
        "labels": labels or {"background": 0, "bright": 1, "dark": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    def make(cases: int = 4, name: str = "Dataset001_Blobs", **options: Any) -> Path:
        return write_dataset(tmp_path / name, cases, **options)

    return make


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four cases that no test changes."""
    return write_dataset(tmp_path_factory.mktemp("blobs") / "Dataset001_Blobs")


def make_config(**changes: Any) -> SegmentConfig:
    """Settings that train in a moment."""
    values: dict[str, Any] = {
        "splits": {"folds": 2},
        "head": {"name": "linear"},
        "training": {"steps": 4, "batch_size": 2, "crop_px": 32, "crops": "grid", "lr_head": 0.01, "log_every_steps": 2},
        "inference": {"mirror": False},
        "metrics": {"surface": False, "bootstrap": 100},
        "seeds": [0, 1],
        "device": "cpu",
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return check_config(SegmentConfig, values, "test")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., SegmentConfig]:
    return make_config
