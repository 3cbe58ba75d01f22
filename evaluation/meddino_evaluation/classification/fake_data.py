"""Tiny fake copies of labelled data sets in their real layout: for tests, and to try a command before the data are there."""

import csv
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.volumes.geometry import geometry_from_xyz
from meddino.volumes.writing import write_volume

_SIZE = 40


def make_fake(name: str, root: Path, patients: int = 6, seed: int = 0) -> None:
    """Write a fake copy of a data set.

    Args:
        name: Of a shipped definition.
        root: Folder to fill.
        patients: For each class.
        seed: Of the pictures.

    Raises:
        ConfigError: There is no generator for that name.
    """
    if name not in FAKES:
        raise ConfigError(f"no fake copy of '{name}'; there are: {', '.join(sorted(FAKES))}")
    root.mkdir(parents=True, exist_ok=True)
    FAKES[name](root, patients, seed)


def _picture(label: int, *position: int | str, size: int = _SIZE) -> NDArray[np.uint8]:
    """A picture whose class can be seen: a disc whose size and place depend on it, on noise of its own."""
    rng = numpy_rng(0, "fake", *position)
    y, x = np.mgrid[:size, :size] / size
    centre = 0.3 + 0.15 * (label % 3)
    disc = (y - centre) ** 2 + (x - 0.5) ** 2 < (0.1 + 0.06 * label) ** 2
    values = 60 + 90 * disc + rng.normal(0, 12, size=(size, size)) + rng.uniform(-10, 10)
    pixels: NDArray[np.uint8] = np.clip(values, 0, 255).astype(np.uint8)
    return pixels


def save_picture(path: Path, values: NDArray[np.generic], rgb: bool = False) -> None:
    """Write a grey picture, or the same in colours, into a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([values, values // 2, values // 3], -1) if rgb else values).save(path)


def _write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


def _save_volume(path: Path, values: NDArray[np.generic]) -> None:
    write_volume(path, values, geometry_from_xyz(values.shape[::-1], (1.5, 1.5, 3.0), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))


def _nih(root: Path, patients: int, seed: int) -> None:
    findings = ["No Finding", *_NIH_LABELS]
    rows: list[dict[str, object]] = []
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    for number in range(patients * len(findings)):
        first = number % len(findings)
        for visit in range(1 + number % 2):
            name = f"{number + 1:08d}_{visit:03d}.png"
            label = findings[first] if first % 5 or first == 0 else f"{findings[first]}|{findings[1]}"
            rows.append({"Image Index": name, "Finding Labels": label, "Follow-up #": visit, "Patient ID": number + 1})
            save_picture(root / f"images_{1 + number % 2:03d}" / "images" / name, _picture(first, seed, number, visit))
            lists["test_list.txt" if (number // len(findings)) % 4 == 3 else "train_val_list.txt"].append(name)
    _write_csv(root / "Data_Entry_2017.csv", rows)
    for file, names in lists.items():
        (root / file).write_text("\n".join(names) + "\n")


_NIH_LABELS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
_CHEXPERT_LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"),
)


def _chexpert(root: Path, patients: int, seed: int) -> None:
    for part, count in (("train", 5 * patients), ("valid", 2 * patients)):
        rows: list[dict[str, object]] = []
        for number in range(count):
            person = number + (0 if part == "train" else 64540)
            path = f"CheXpert-v1.0-small/{part}/patient{person:05d}/study1/view1_frontal.jpg"
            save_picture(root / path, _picture(number % 5, seed, part, number))
            row: dict[str, object] = {"Path": path, "Sex": "Unknown", "Age": 0, "Frontal/Lateral": "Frontal", "AP/PA": "AP"}
            for place, label in enumerate(_CHEXPERT_LABELS):
                options = ["1.0", "0.0", "", "-1.0"] if part == "train" else ["1.0", "0.0"]
                row[label] = options[(number + place) % len(options)]
            rows.append(row)
        _write_csv(root / "CheXpert-v1.0-small" / f"{part}.csv", rows)


def _sars_cov_2(root: Path, patients: int, seed: int) -> None:
    for label, folder in enumerate(("non-COVID", "COVID")):
        mark = "Non-Covid" if folder == "non-COVID" else "Covid"
        for number in range(patients * 5):
            save_picture(root / folder / f"{mark} ({number + 1}).png", _picture(label, seed, folder, number))


def _brain_tumor(root: Path, patients: int, seed: int) -> None:
    import h5py

    number = 0
    root.mkdir(parents=True, exist_ok=True)
    for label in (1, 2, 3):
        for patient in range(patients):
            for _ in range(1 + patient % 2):
                number += 1
                with h5py.File(root / f"{number}.mat", "w") as file:
                    group = file.create_group("cjdata")
                    group["image"] = _picture(label, seed, number).astype(np.int16).T * 8
                    group["label"] = np.array([[float(label)]])
                    group["PID"] = np.array([[ord(letter)] for letter in f"{label}{patient:05d}"], dtype=np.uint16)


def _tuberculosis(prefix: str, digits: int) -> Callable[[Path, int, int], None]:
    def make(root: Path, patients: int, seed: int) -> None:
        for label in (0, 1):
            for number in range(patients):
                name = f"{prefix}_{number + label * 200 + 1:0{digits}d}_{label}"
                save_picture(root / "CXR_png" / f"{name}.png", _picture(label, seed, label, number))
                reading = root / "ClinicalReadings" / f"{name}.txt"
                reading.parent.mkdir(exist_ok=True)
                reading.write_text("fake\n")

    return make


def _chest_xray(root: Path, patients: int, seed: int) -> None:
    for part, count in (("train", patients), ("val", 2), ("test", patients // 2 + 1)):
        for label, folder in enumerate(("NORMAL", "PNEUMONIA")):
            for number in range(count):
                person = number + {"train": 100, "val": 3000, "test": 5000}[part]
                name = f"IM-{person:04d}-0001.jpeg" if label == 0 else f"person{person}_bacteria_{person * 3}.jpeg"
                save_picture(root / part / folder / name, _picture(label, seed, part, label, number))


def _aptos(root: Path, patients: int, seed: int) -> None:
    rows: list[dict[str, object]] = []
    for grade in range(5):
        for number in range(patients):
            code = f"{grade}{number:011x}"
            save_picture(root / "train_images" / f"{code}.png", _picture(grade, seed, grade, number), rgb=True)
            rows.append({"id_code": code, "diagnosis": grade})
    _write_csv(root / "train.csv", rows)


def _fgadr(root: Path, patients: int, seed: int) -> None:
    lines = []
    for grade in range(5):
        for number in range(patients):
            name = f"{grade * patients + number:04d}_{1 + number % 2}.png"
            save_picture(root / "Seg-set" / "Original_Images" / name, _picture(grade, seed, grade, number), rgb=True)
            lines.append(f"{name},{grade}\n")
    (root / "Seg-set" / "DR_Seg_Grading_Label.csv").write_text("".join(lines))


def _brain_tumor_mri(root: Path, patients: int, seed: int) -> None:
    for part, count in (("Training", patients), ("Testing", patients // 2 + 1)):
        for label, folder in enumerate(("glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor")):
            for number in range(count):
                save_picture(root / part / folder / f"image({number + 1}).jpg", _picture(label, seed, part, label, number))


def _ham10000(root: Path, patients: int, seed: int) -> None:
    rows: list[dict[str, object]] = []
    number = 0
    for label, name in enumerate(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")):
        for lesion in range(patients):
            for _ in range(1 + lesion % 2):
                number += 1
                image = f"ISIC_{24306 + number:07d}"
                folder = root / f"HAM10000_images_part_{1 + number % 2}"
                save_picture(folder / f"{image}.jpg", _picture(label, seed, number), rgb=True)
                rows.append({"lesion_id": f"HAM_{label}{lesion:06d}", "image_id": image, "dx": name, "dx_type": "histo"})
    _write_csv(root / "HAM10000_metadata.csv", rows)


def _glioma(root: Path, patients: int, seed: int) -> None:
    rows: list[dict[str, object]] = []
    for grade in (0, 1):
        for number in range(patients):
            name = f"G{grade}{number:03d}"
            for modality in ("T1c", "T2", "FLAIR"):
                slices = np.stack([_picture(grade, seed, name, modality, z) for z in range(3 + number % 3)])
                _save_volume(root / name / f"{modality}.nii.gz", slices.astype(np.int16))
            rows.append({"patient": name, "grade": "HGG" if grade else "LGG"})
    _write_csv(root / "labels.csv", rows)


def _ct_contrast(root: Path, patients: int, seed: int) -> None:
    rows: list[dict[str, object]] = []
    for label in (0, 1):
        for number in range(patients):
            for scan in range(1 + number % 2):
                path = f"ct/tcga_luad/TCGA-{label}{number:02d}/ID_{label}{number}{scan}_CONTRAST_{label}_CT.nii.gz"
                scanned = _picture(label, seed, label, number, scan).astype(np.int16) * 6 - 1000
                _save_volume(root / path, scanned[None])
                rows.append({"path": path, "patient": f"TCGA-{label}{number:02d}", "contrast": label})
    _write_csv(root / "classification" / "ct_contrast" / "labels.csv", rows)


def _ct_plane(root: Path, patients: int, seed: int) -> None:
    for part in ("dev", "extra"):
        rows: list[dict[str, object]] = []
        arrays: dict[str, NDArray[np.int16]] = {}
        for number in range(patients):
            for label, plane in enumerate(("axial", "coronal", "sagittal")):
                key = f"hu_{len(rows):03d}"
                arrays[key] = _picture(label, seed, part, number, label).astype(np.int16) * 6 - 1000
                rows.append({"key": key, "file": f"A{number}/{plane}/0.dcm", "patient": f"A{number}", "plane": plane})
        (root / part).mkdir(parents=True, exist_ok=True)
        np.savez(root / part / "slices.npz", **arrays)  # type: ignore[arg-type]
        _write_csv(root / part / "slices.csv", rows)


def _brain_mri(root: Path, patients: int, seed: int) -> None:
    for label, name in enumerate(("glioma", "meningioma", "pituitary")):
        for number in range(2 * patients):
            save_picture(root / name / f"{1000 * label + 11 * number}.jpg", _picture(label, seed, name, number))


def _pneumoniamnist(root: Path, patients: int, seed: int) -> None:
    labels = np.arange(4 * patients)[:, None] % 2
    images = np.stack([_picture(int(label[0]), seed, number, size=28) for number, label in enumerate(labels)])
    with zipfile.ZipFile(root / "val.npz", "w") as archive:
        for name, values in (("images", images), ("labels", labels.astype(np.uint8))):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, values)


def _segmentation_pair(image: Path, label: Path, seed: int, number: int, classes: int) -> None:
    picture = np.stack([_picture(z % 3, seed, number, z) for z in range(4)]).astype(np.int16) * 4 - 200
    labels = np.zeros(picture.shape, dtype=np.uint8)
    for value in range(1, classes + 1):
        labels[:, 4 + value : 8 + value, 6:14] = value
    _save_volume(image, picture)
    _save_volume(label, labels)


def _decathlon(prefix: str, classes: int) -> Callable[[Path, int, int], None]:
    def make(root: Path, patients: int, seed: int) -> None:
        for number in range(patients):
            name = f"{prefix}_{number + 1:03d}.nii.gz"
            _segmentation_pair(root / "imagesTr" / name, root / "labelsTr" / name, seed, number, classes)

    return make


def _btcv(root: Path, patients: int, seed: int) -> None:
    for number in range(patients):
        image = root / "RawData" / "Training" / "img" / f"img{number + 1:04d}.nii.gz"
        label = root / "RawData" / "Training" / "label" / f"label{number + 1:04d}.nii.gz"
        _segmentation_pair(image, label, seed, number, 13)


FAKES: dict[str, Callable[[Path, int, int], None]] = {
    "nih_chestxray14": _nih,
    "chexpert": _chexpert,
    "sars_cov_2_ct": _sars_cov_2,
    "brain_tumor": _brain_tumor,
    "montgomery": _tuberculosis("MCUCXR", 4),
    "shenzhen": _tuberculosis("CHNCXR", 4),
    "chest_xray_pneumonia": _chest_xray,
    "aptos2019": _aptos,
    "fgadr": _fgadr,
    "brain_tumor_mri": _brain_tumor_mri,
    "ham10000": _ham10000,
    "glioma_grading": _glioma,
    "ct_contrast": _ct_contrast,
    "ct_plane": _ct_plane,
    "brain_mri": _brain_mri,
    "pneumoniamnist": _pneumoniamnist,
    "msd_heart": _decathlon("la", 1),
    "msd_hippocampus": _decathlon("hippocampus", 2),
    "msd_spleen": _decathlon("spleen", 1),
    "amos22": _decathlon("amos", 15),
    "btcv": _btcv,
}
"""One generator for each shipped definition."""
