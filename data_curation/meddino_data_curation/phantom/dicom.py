"""A phantom patient as a DICOM series, with a header as full of personal text as a real one (all of it made up)."""

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from meddino.core.seeds import derive_seed
from meddino_data_curation.phantom.scan import Scan

_INTERCEPT = -1024
_IMPLEMENTATION_UID = "1.2.826.0.1.3680043.8.498.1"  # below pydicom's root, which anybody may use


def write_dicom_series(scan: Scan, folder: Path, seed: int, number: int) -> None:
    """Write one file a slice, file names in no anatomical order, as an archive's export has them.

    Args:
        scan: The patient.
        folder: Is made.
        seed: Cohort's seed, for the identifiers.
        number: Patient's number, for the identifiers.
    """
    folder.mkdir(parents=True)
    count = scan.hu.shape[0]
    entropy = [f"meddino-phantom-{seed}-{number}"]
    study, series, frame = (generate_uid(entropy_srcs=[*entropy, kind]) for kind in ("study", "series", "frame"))
    for index in range(count):
        uid = generate_uid(entropy_srcs=[*entropy, f"slice-{index}"])
        dataset = _slice_dataset(scan, index, uid, number)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        name = f"IM{derive_seed(seed, 'name', number, index) % 10**8:08d}"  # no extension
        dataset.save_as(folder / name, enforce_file_format=True)


def _slice_dataset(scan: Scan, index: int, uid: str, number: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, uid
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, _IMPLEMENTATION_UID
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, uid, "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientName, dataset.PatientID = f"Phantom^Patient{number:03d}", f"PHANTOM-{number:05d}"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19500101", "O", "070Y"
    dataset.PatientAddress, dataset.InstitutionName = "1 Nowhere Street", "Hospital of Nobody"
    dataset.ReferringPhysicianName, dataset.AccessionNumber = "Nemo^Doctor", f"ACC{number:07d}"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "101500", "1"
    dataset.StudyDescription, dataset.SeriesDescription = "CT THORAX ABDOMEN OF A PHANTOM", "AXIAL B30f"
    dataset.Manufacturer, dataset.ConvolutionKernel, dataset.KVP = "MedDINO", "B30f", "120"
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.PatientPosition = 2, scan.hu.shape[0] - index, "HFS"
    z_mm, y_mm, x_mm = (first + step for first, step in zip(scan.first_mm, (scan.spacing_mm[0] * index, 0.0, 0.0), strict=True))
    dataset.ImagePositionPatient = [f"{value:.4f}" for value in (x_mm, y_mm, z_mm)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [f"{value:.4f}" for value in scan.spacing_mm[1:]]
    dataset.SliceThickness = f"{scan.spacing_mm[0]:.4f}"
    stored = (scan.hu[index].astype(np.int32) - _INTERCEPT).astype(np.uint16)
    (dataset.Rows, dataset.Columns), dataset.SamplesPerPixel = stored.shape, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, _INTERCEPT, "HU"
    dataset.PixelData = stored.tobytes()
    return dataset
