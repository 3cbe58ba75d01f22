"""Tiny detection sets: bright squares on noise, in every layout."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

QUICK = [
    "data.image_size_px=64",
    "device=cpu",
    "split.repeats=1",
    "split.val_fraction=0.2",
    "training.epochs=1",
    "training.batch_size=4",
    "detector.pyramid_channels=8",
    "detector.box_head_width=16",
    "detector.anchor_strides=3",
    "metrics.resamples=50",
]
"""A detector of seconds."""


def squares(number, size=64):
    """An image of one or no bright square of a class that its brightness shows, and its boxes."""
    rng = np.random.default_rng(number)
    pixels = rng.normal(60, 8, (size, size))
    if number % 5 == 4:
        return np.clip(pixels, 0, 255).astype(np.uint8), []
    side, label = int(rng.integers(14, 24)), number % 2
    x, y = (int(one) for one in rng.integers(2, size - side - 2, 2))
    pixels[y : y + side, x : x + side] = 230 if label else 160
    return np.clip(pixels, 0, 255).astype(np.uint8), [(x, y, x + side, y + side, "bright" if label else "grey")]


@pytest.fixture(scope="session")
def table_set(tmp_path_factory):
    """A folder with boxes.csv: 20 images of 10 patients, some without a box."""
    return write_boxes(tmp_path_factory.mktemp("boxes"))


def write_boxes(root):
    """Write boxes.csv and its 20 images of 10 patients, some without a box."""
    root.mkdir(exist_ok=True)
    rows = []
    for number in range(20):
        pixels, boxes = squares(number)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        first = {"image": f"{number:02d}.png", "patient": f"p{number // 2}"}
        for x1, y1, x2, y2, label in boxes or [("", "", "", "", "")]:
            rows.append({**first, "x1": x1, "y1": y1, "x2": x2, "y2": y2, "label": label})
    write_table(root / "boxes.csv", rows)
    return root


def write_table(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "x1", "y1", "x2", "y2", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def coco(tmp_path):
    """A function that writes a COCO file of three images, changed by the caller, and returns its path."""

    def write(**changes):
        for number in range(3):
            Image.fromarray(squares(number)[0]).save(tmp_path / f"{number}.png")
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64, "patient": f"p{n}"} for n in range(3)],
            "categories": [{"id": 7, "name": "grey"}, {"id": 3, "name": "bright"}],
            "annotations": [
                {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 10, 20]},
                {"id": 2, "image_id": 1, "category_id": 3, "bbox": [5.5, 6, 10, 20]},
            ],
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content | changes))
        return path

    return write
