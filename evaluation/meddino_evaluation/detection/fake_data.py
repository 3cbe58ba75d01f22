"""Tiny fake copies of the detection tasks in their real layout."""

import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.volumes.dicom.writing import uid_of, write_radiograph

_SIZE = 96
_FINDINGS = ("Cardiomegaly", "Nodule/Mass")
_TRAINED = 5
"""Of so many VinDr-CXR pictures one is of the test part."""


def fake_kvasir(root: Path, number: int, rng: np.random.Generator) -> None:
    """Add one picture to a fake Kvasir-SEG with boxes."""
    folder = root / "Kvasir-SEG"
    pixels, box = _bright_square(rng)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    name = f"cjv{number:022d}"  # beside the pictures of the task kvasir_seg, which lie in the same folder
    Image.fromarray(np.stack([pixels, pixels // 2, pixels // 3], -1)).save(folder / "images" / f"{name}.jpg")
    mask = np.zeros((_SIZE, _SIZE), dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(mask).save(folder / "masks" / f"{name}.jpg")
    path = folder / "kavsir_bboxes.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    content[name] = {"height": _SIZE, "width": _SIZE, "bbox": [{"label": "polyp", **corners}]}
    path.write_text(json.dumps(content))


def fake_vindr(root: Path, number: int, rng: np.random.Generator) -> None:
    """Add one radiograph to a fake VinDr-CXR: three readers drew boxes in training, the test has their consensus."""
    pixels, box = _bright_square(rng)
    part, name = "test" if number % _TRAINED == 0 else "train", f"{number:032x}"
    finding = _FINDINGS[number % len(_FINDINGS)] if number % 7 else "No finding"
    elements = {"SOPInstanceUID": uid_of("vindr", name), "StudyInstanceUID": uid_of("study", name), "PatientID": name}
    (root / part).mkdir(parents=True, exist_ok=True)
    write_radiograph(root / part / f"{name}.dicom", elements, pixels.astype(np.uint16) * 16)
    readers = [f"R{reader}" for reader in (8, 9, 10)] if part == "train" else [""]
    for reader in readers:
        moved = [int(side + rng.integers(-2, 3)) for side in box] if reader else box
        corners = ["", "", "", ""] if finding == "No finding" else [str(min(max(side, 0), _SIZE)) for side in moved]
        row = [name, *([reader] if reader else []), finding, *corners]
        _append(root / "annotations" / f"annotations_{part}.csv", row, bool(reader))


def _append(path: Path, row: list[str], has_reader: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow(["image_id", *(["rad_id"] if has_reader else []), "class_name", "x_min", "y_min", "x_max", "y_max"])
        writer.writerow(row)


def _bright_square(rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[int]]:
    side = int(rng.integers(24, 40))
    x, y = (int(one) for one in rng.integers(4, _SIZE - side - 4, 2))
    values = rng.normal(70, 8, (_SIZE, _SIZE))
    values[y : y + side, x : x + side] += 110
    pixels: NDArray[np.uint8] = np.clip(values, 0, 255).astype(np.uint8)
    return pixels, [x, y, x + side, y + side]


FAKES = {"kvasir_detection": fake_kvasir, "vindr_cxr": fake_vindr}
"""Task to what adds one picture to its fake copy: (root, number, generator)."""
