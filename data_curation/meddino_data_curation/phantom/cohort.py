"""The cohort on disk: `ct/` to pretrain on and an nnU-Net raw dataset of other patients to segment."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import meddino
from meddino.core.command import usable_cores
from meddino.core.errors import ConfigError
from meddino.core.files import atomic_directory, remove_leftovers, write_json
from meddino.volumes.geometry import Geometry
from meddino.volumes.writing import write_volume
from meddino_data_curation.phantom.dicom import write_dicom_series
from meddino_data_curation.phantom.patient import LABELS
from meddino_data_curation.phantom.scan import Scan, scan_patient

DATASET_NAME = "Dataset900_Phantom"
_LICENCE = "Apache-2.0 (computer-made; no patient)"


@dataclass(frozen=True)
class CohortSizes:
    """How many patients go where; those of different roles are different patients.

    Attributes:
        ct: To pretrain on; the last one is written as a DICOM series.
        train: nnU-Net imagesTr and labelsTr.
        test: nnU-Net imagesTs and labelsTs.
    """

    ct: int = 16
    train: int = 8
    test: int = 2

    @classmethod
    def scaled(cls, patients: int) -> "CohortSizes":
        """Return sizes in the default proportions.

        Args:
            patients: Patients in `ct`, at least 1.

        Raises:
            ConfigError: If fewer than 1 is asked for.
        """
        if patients < 1:
            raise ConfigError(f"--patients {patients}: a cohort needs at least 1 patient")
        return cls(ct=patients, train=max(2, round(patients / 2)), test=max(1, round(patients / 8)))


def write_cohort(out: Path, sizes: CohortSizes, seed: int) -> None:
    """Write the cohort; equal arguments give equal bytes.

    Args:
        out: Folder that gets `ct/`, `segmentation/` and `cohort.json`. A finished cohort of the same arguments is left
            as it is, another one is replaced.
        sizes: How many patients.
        seed: Seed of the whole cohort.

    Raises:
        ConfigError: If `out` is a file or a folder that holds something else than a cohort.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a new or empty folder")
    strange = sorted(entry.name for entry in out.iterdir() if not _is_own(entry.name)) if out.is_dir() else []
    if strange:
        raise ConfigError(f"--out {out} holds other things ('{strange[0]}'); name a new or empty folder")
    description = {"seed": seed, "sizes": asdict(sizes), "tool_version": meddino.__version__}
    note = out / "cohort.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == description:
        return
    note.unlink(missing_ok=True)
    with atomic_directory(out / "ct") as folder:
        _each(lambda number: _write_ct(folder, number, sizes, seed), sizes.ct)
    with atomic_directory(out / "segmentation") as folder:
        _write_nnunet(folder / DATASET_NAME, sizes, seed)
    remove_leftovers(out)
    write_json(note, description)


def _each(write: Callable[[int], None], count: int) -> None:
    """Write patients 0 to count - 1, two at a time where there are two cores: NumPy lets go of the interpreter's lock."""
    with ThreadPoolExecutor(min(2, usable_cores())) as pool:
        for _ in pool.map(write, range(count)):  # what is not begun is dropped once one fails or a signal comes
            pass


def _write_ct(folder: Path, number: int, sizes: CohortSizes, seed: int) -> None:
    scan = scan_patient(seed, "ct", number)
    if number == sizes.ct - 1:
        write_dicom_series(scan, folder / f"patient_{number:03d}_dicom", seed, number)
    else:
        # Every third one lies turned round in its file, as volumes from other tools do.
        _write_nifti(scan, scan.hu, folder / f"patient_{number:03d}.nii.gz", "RAS" if number % 3 == 1 else "LPS")


def _is_own(name: str) -> bool:
    """Tell whether an entry is of a cohort; what a killed command left is (`ct.123.partial`)."""
    return name.partition(".")[0] in ("ct", "segmentation") or name.startswith("cohort.json")


def _write_nnunet(folder: Path, sizes: CohortSizes, seed: int) -> None:
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)

    def write(number: int) -> None:
        part = "Tr" if number < sizes.train else "Ts"
        scan = scan_patient(seed, "segmentation", number)
        _write_nifti(scan, scan.hu, folder / f"images{part}" / f"phantom_{number:03d}_0000.nii.gz")
        _write_nifti(scan, scan.labels, folder / f"labels{part}" / f"phantom_{number:03d}.nii.gz")

    _each(write, sizes.train + sizes.test)
    write_json(
        folder / "dataset.json",
        {
            "name": "Phantom",
            "description": "Procedural CT patients; the labels are exact",
            "licence": _LICENCE,
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": sizes.train,
            "numTest": sizes.test,
            "file_ending": ".nii.gz",
        },
    )


def _write_nifti(scan: Scan, voxels: NDArray[np.generic], path: Path, orientation: str = "LPS") -> None:
    z_mm, y_mm, x_mm = scan.first_mm
    geometry = Geometry(
        scan.hu.shape, scan.spacing_mm, (x_mm, y_mm, z_mm), np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    )
    write_volume(path, voxels, geometry, orientation, level=3)
