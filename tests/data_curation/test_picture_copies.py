"""Copies of pictures are found by what they look like, in a build, by --exclude and by an audit."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.config import common_modality
from meddino_data_curation.selection.fingerprint import picture_vector
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter


def picture(seed: int, size: int = 128) -> Image.Image:
    rng = np.random.default_rng(seed)
    values = 3 * gaussian_filter(rng.normal(size=(size, size)), 6) + gaussian_filter(rng.normal(size=(size, size)), 1.5)
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) / (high - low) * 255).astype(np.uint8))


def disc(seed: int) -> Image.Image:
    """A bright disc as all fundus photographs have it, with detail of its own."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    return Image.fromarray((np.asarray(picture(seed)) * 0.3 + 120 * (np.hypot(x, y) < 0.9)).astype(np.uint8))


def as_jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES = {
    "jpeg": as_jpeg,
    "half": lambda image: image.resize((64, 64)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "flat": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def cosine(one: Image.Image, other: Image.Image) -> float:
    first, second = (picture_vector(np.asarray(each)).astype(float) for each in (one, other))
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_picture_vector__copies_are_alike_and_others_are_not():
    for kind, change in COPIES.items():
        assert cosine(picture(0), change(picture(0))) > 0.96 or kind == "flipped"
    assert max(cosine(picture(0), picture(seed)) for seed in range(1, 20)) < 0.6
    discs = [disc(seed) for seed in range(10)]
    assert max(cosine(discs[0], other) for other in discs[1:]) < 0.96 < cosine(discs[0], as_jpeg(discs[0]))
    assert picture_vector(np.full((50, 60), 7, np.uint8)) is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in ("own", "test", "others"):
        (root / name).mkdir()
    for seed in range(4):
        picture(seed).save(root / "own" / f"p{seed}.png")
    for number, change in enumerate(COPIES.values()):
        change(picture(0)).save(root / "own" / f"copy{number}.png")
    as_jpeg(picture(1).resize((100, 100))).save(root / "test" / "case_1.jpg")
    picture(9).save(root / "others" / "case_9.png")
    config = {"sources": [{"name": "own", "path": str(root / "own"), "modality": "image"}], "workers": 1}
    (root / "sources.yaml").write_text(json.dumps(config))
    return root


def statuses(corpus) -> dict:
    rows = pq.read_table(corpus / "volumes.parquet").to_pylist()
    return {kind: sum(row["status"] == kind for row in rows) for kind in ("accepted", "duplicate", "rejected")}


def test_build__copies_come_once_and_an_audit_finds_those_of_a_task(folders, capsys):
    corpus = folders / "corpus"
    assert main(["build", "--config", str(folders / "sources.yaml"), "--out", str(corpus)]) == 0
    assert statuses(corpus) == {"accepted": 4, "duplicate": 5, "rejected": 0}
    assert main(["audit", str(corpus), "--against", str(folders / "others"), "--name", "clean"]) == 0
    assert main(["audit", str(corpus), "--against", str(folders / "test"), "--name", "task"]) == 2
    audits = {entry["name"]: entry["overlaps"] for entry in json.loads((corpus / "corpus.json").read_text())["audit"]}
    assert audits == {"clean": 0, "task": 1}


def test_build__pictures_of_held_out_folders_stay_out(folders):
    corpus = folders / "without"
    exclude = ["--exclude", str(folders / "test")]
    assert main(["build", "--config", str(folders / "sources.yaml"), "--out", str(corpus), *exclude]) == 0
    assert statuses(corpus) == {"accepted": 3, "duplicate": 5, "rejected": 1}


def test_common_modality__is_the_sources_or_the_files_own_word():
    assert common_modality([]) == "ct" and common_modality(["image", "image"]) == "image"
    assert common_modality(["ct", "mr"]) == "auto"
