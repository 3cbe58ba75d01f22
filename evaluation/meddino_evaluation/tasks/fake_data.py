"""Tiny fake copies of tasks in their real layout: for tests, and to try a command without the data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.volumes.geometry import geometry_from_xyz
from meddino.volumes.writing import write_volume
from meddino_evaluation.classification import fake_data as classification
from meddino_evaluation.classification.fake_data import save_picture
from meddino_evaluation.detection import fake_data as detection
from meddino_evaluation.tasks.definition import LabelledLayout, OfTask, load_task

_SIZE = 48


def make_fake(name: str, root: Path, patients: int = 6, seed: int = 0) -> None:
    """Write a fake copy of a task's data.

    Args:
        name: Of a shipped task.
        root: Folder to fill.
        patients: Pictures or volumes; of the multi-site task for each site.
        seed: Of the pictures.

    Raises:
        ConfigError: There is no generator for that name.
    """
    if name not in FAKES:
        layout = load_task(name).layout
        if isinstance(layout, LabelledLayout):
            classification.make_fake(layout.dataset, root, patients, seed)
            return
        name = layout.task if isinstance(layout, OfTask) else name
    if name not in FAKES:
        raise ConfigError(f"no fake copy of '{name}'; there are: {', '.join(sorted(FAKES))}")
    for number in range(patients):
        FAKES[name](root, number, numpy_rng(seed, "fake task", name, number))


def _disc(rng: np.random.Generator, size: int, place: float = 0.5, radius: float = 0.2) -> NDArray[np.bool_]:
    y, x = np.mgrid[:size, :size] / size
    row, col = place + rng.uniform(-0.05, 0.05, 2)
    found: NDArray[np.bool_] = (y - row) ** 2 + (x - col) ** 2 < (radius + rng.uniform(-0.03, 0.03)) ** 2
    return found


def _grey(rng: np.random.Generator, bright: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a picture in which the structure is brighter than the rest."""
    values: NDArray[np.uint8] = np.clip(70 + 100 * bright + rng.normal(0, 10, bright.shape), 0, 255).astype(np.uint8)
    return values


def _mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = mask.astype(np.uint8) * 255
    return values


def _isic2018(root: Path, number: int, rng: np.random.Generator) -> None:
    lesion, name = _disc(rng, _SIZE), f"ISIC_{number:07d}"
    save_picture(root / "ISIC2018_Task1-2_Training_Input" / f"{name}.jpg", _grey(rng, lesion), rgb=True)
    save_picture(root / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png", _mask(lesion))
    (root / "ISIC2018_Task1-2_Training_Input" / "LICENSE.txt").write_text("fake")


def _jsrt(root: Path, number: int, rng: np.random.Generator) -> None:
    size, name = 1024, f"JPCLN{number + 1:03d}"
    parts = {"left lung": (0.35, 0.15), "right lung": (0.65, 0.15), "heart": (0.5, 0.1)}
    parts |= {"left clavicle": (0.2, 0.05), "right clavicle": (0.8, 0.05)}
    bright = np.zeros((size, size), dtype=bool)
    for part, (place, radius) in parts.items():
        own = _disc(rng, size, place, radius)
        bright |= own
        save_picture(root / "scratch" / f"fold{2 - number % 2}" / "masks" / part / f"{name}.gif", _mask(own))
    film = 4095 - 16 * _grey(rng, bright).astype(np.uint16)  # density: what is bright on the light box is low
    path = root / "All247images" / f"{name}.IMG"
    path.parent.mkdir(parents=True, exist_ok=True)
    film.repeat(2, 0).repeat(2, 1).astype(">u2").tofile(path)


def _kvasir_seg(root: Path, number: int, rng: np.random.Generator) -> None:
    polyp, name = _disc(rng, _SIZE), f"cju{number:03d}.jpg"
    save_picture(root / "Kvasir-SEG" / "images" / name, _grey(rng, polyp), rgb=True)
    save_picture(root / "Kvasir-SEG" / "masks" / name, _mask(polyp), rgb=False)


def _drive(root: Path, number: int, rng: np.random.Generator) -> None:
    part = "test" if number % 3 == 2 else "training"
    y, x = np.mgrid[:_SIZE, :_SIZE]
    vessel = (np.abs(y - _SIZE / 2 - 8 * np.sin(x / 8 + number)) < 2) | (np.abs(x - 12 - number) < 2)
    save_picture(root / part / "images" / f"{number + 1:02d}_{part}.tif", _grey(rng, vessel), rgb=True)
    save_picture(root / part / "1st_manual" / f"{number + 1:02d}_manual1.gif", _mask(vessel))
    save_picture(root / part / "mask" / f"{number + 1:02d}_{part}_mask.gif", _mask(np.ones_like(vessel)))


def _buid(root: Path, number: int, rng: np.random.Generator) -> None:
    finding = ("benign", "malignant", "normal")[number % 3]
    folder, name = root / "Dataset_BUSI_with_GT" / finding, f"{finding} ({number // 3 + 1})"
    first, second = _disc(rng, _SIZE, 0.35, 0.12), _disc(rng, _SIZE, 0.7, 0.12)
    two = finding == "benign"
    save_picture(folder / f"{name}.png", _grey(rng, first | second if two else first), rgb=True)
    save_picture(folder / f"{name}_mask.png", _mask(first if finding != "normal" else np.zeros_like(first)))
    if two:
        save_picture(folder / f"{name}_mask_1.png", _mask(second))


def _volume(path: Path, values: NDArray[np.generic], spacing_mm: float = 2.0) -> None:
    spacing = (spacing_mm, spacing_mm, 3.0)
    write_volume(path, values, geometry_from_xyz(values.shape[::-1], spacing, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))


def _stack(masks: dict[int, NDArray[np.bool_]], slices: int = 4) -> NDArray[np.int16]:
    """Put masks of one slice into the inner slices of a volume, each under its value."""
    volume = np.zeros((slices, _SIZE, _SIZE), dtype=np.int16)
    for value, mask in masks.items():
        volume[1 : slices - 1, mask] = value
    return volume


def _brats2018(root: Path, number: int, rng: np.random.Generator) -> None:
    name = f"Brats18_CBICA_{number:03d}_1"
    folder = root / "MICCAI_BraTS_2018_Data_Training" / ("HGG" if number % 2 else "LGG") / name
    seg = _stack({2: _disc(rng, _SIZE, 0.5, 0.3), 4: _disc(rng, _SIZE, 0.5, 0.2), 1: _disc(rng, _SIZE, 0.5, 0.1)})
    shown = {"flair": (2, 4, 1), "t1": (1,), "t1ce": (4,), "t2": (2,)}
    for sequence, values in shown.items():
        _volume(
            folder / f"{name}_{sequence}.nii.gz", np.stack([_grey(rng, np.isin(one, values)) for one in seg]).astype(np.int16)
        )
    _volume(folder / f"{name}_seg.nii.gz", seg)


def _mmwhs(modality: str) -> Callable[[Path, int, np.random.Generator], None]:
    def make(root: Path, number: int, rng: np.random.Generator) -> None:
        values = (205, 420, 500, 550, 600, 820, 850)
        seg = _stack({value: _disc(rng, _SIZE, 0.15 + 0.11 * place, 0.1) for place, value in enumerate(values)})
        places = {value: place for place, value in enumerate(values, start=1)} | {0: 0}
        strength = np.vectorize(places.get)(seg)
        image = (100 * strength + rng.normal(0, 10, seg.shape)).astype(np.int16)
        name = f"{modality}_train_{1001 + number}"
        _volume(root / f"{modality}_train" / f"{name}_image.nii.gz", image - (400 if modality == "ct" else 0))
        _volume(root / f"{modality}_train" / f"{name}_label.nii.gz", seg)

    return make


def _prostate_sites(root: Path, number: int, rng: np.random.Generator) -> None:
    for place, site in enumerate(("BMC", "RUNMC", "BIDMC", "HK")):
        gland = _disc(rng, _SIZE, 0.5, 0.2)
        seg = _stack({1: gland})
        if site == "HK":
            seg[:, : _SIZE // 2] *= 2  # zones
        # Sites further down the list look more and more unlike the first.
        image = np.stack([_grey(rng, one > 0) for one in seg]).astype(np.int16) * (1 if place < 3 else -1)
        image = image + rng.normal(0, 12 * place, image.shape).astype(np.int16)
        _volume(root / site / f"Case{number:02d}.nii.gz", image.astype(np.int16), 1.0 + 0.5 * place)
        end = "Segmentation" if site == "BIDMC" else "segmentation"
        _volume(root / site / f"Case{number:02d}_{end}.nii.gz", seg, 1.0 + 0.5 * place)


LABEL_MAP_FAKES: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "isic2018": _isic2018,
    "jsrt": _jsrt,
    "kvasir_seg": _kvasir_seg,
    "drive": _drive,
    "buid": _buid,
    "brats2018": _brats2018,
    "mmwhs_ct": _mmwhs("ct"),
    "mmwhs_mr": _mmwhs("mr"),
    "prostate_sites": _prostate_sites,
}
"""One generator for each task with label maps: writes one patient."""

FAKES = LABEL_MAP_FAKES | detection.FAKES
"""Those of detection too; classification has its own."""
