"""A phantom patient as a DICOM series, with a header as full of personal text as a real one (all of it made up)."""

from pathlib import Path
from typing import Any

import numpy as np

from meddino.core.seeds import derive_seed
from meddino.volumes.dicom.writing import uid_of, write_ct_slice
from meddino_data_curation.phantom.scan import Scan

_INTERCEPT = -1024


def write_dicom_series(scan: Scan, folder: Path, seed: int, number: int) -> None:
    """Write one file a slice, file names in no anatomical order, as an archive's export has them.

    Args:
        scan: The patient.
        folder: Is made.
        seed: Cohort's seed, for the identifiers.
        number: Patient's number, for the identifiers.
    """
    folder.mkdir(parents=True)
    patient = f"meddino-phantom-{seed}-{number}"
    study, series, frame = (uid_of(patient, kind) for kind in ("study", "series", "frame"))
    for index, hu in enumerate(scan.hu):
        elements = {
            **_elements(scan, index, number),
            "SOPInstanceUID": uid_of(patient, f"slice-{index}"),
            "StudyInstanceUID": study,
            "SeriesInstanceUID": series,
            "FrameOfReferenceUID": frame,
        }
        name = f"IM{derive_seed(seed, 'name', number, index) % 10**8:08d}"  # no extension
        write_ct_slice(folder / name, elements, (hu.astype(np.int32) - _INTERCEPT).astype(np.uint16))


def _elements(scan: Scan, index: int, number: int) -> dict[str, Any]:
    z_mm, y_mm, x_mm = (first + step for first, step in zip(scan.first_mm, (scan.spacing_mm[0] * index, 0.0, 0.0), strict=True))
    return {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": f"Phantom^Patient{number:03d}",
        "PatientID": f"PHANTOM-{number:05d}",
        "PatientBirthDate": "19500101",
        "PatientSex": "O",
        "PatientAge": "070Y",
        "PatientAddress": "1 Nowhere Street",
        "InstitutionName": "Hospital of Nobody",
        "ReferringPhysicianName": "Nemo^Doctor",
        "AccessionNumber": f"ACC{number:07d}",
        "StudyDate": "20200101",
        "StudyTime": "101500",
        "StudyID": "1",
        "StudyDescription": "CT THORAX ABDOMEN OF A PHANTOM",
        "SeriesDescription": "AXIAL B30f",
        "Manufacturer": "MedDINO",
        "ConvolutionKernel": "B30f",
        "KVP": "120",
        "SeriesNumber": 2,
        "InstanceNumber": scan.hu.shape[0] - index,
        "PatientPosition": "HFS",
        "ImagePositionPatient": [f"{value:.4f}" for value in (x_mm, y_mm, z_mm)],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [f"{value:.4f}" for value in scan.spacing_mm[1:]],
        "SliceThickness": f"{scan.spacing_mm[0]:.4f}",
        "RescaleSlope": 1,
        "RescaleIntercept": _INTERCEPT,
        "RescaleType": "HU",
    }
