"""Small DICOM files for tests."""

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def ct_slice(hu: np.ndarray, z_mm: float, series: str = "series", patient: str = "P1", **changes) -> FileDataset:
    """One CT slice; `changes` set or (with None) remove elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = changes.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=[series, patient, repr(z_mm), repr(sorted(changes.items(), key=str))]
    )
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID, item.Modality = CTImageStorage, meta.MediaStorageSOPInstanceUID, "CT"
    item.ImageType, item.PatientID, item.PatientName = ["ORIGINAL", "PRIMARY", "AXIAL"], patient, "Doe^Jane"
    item.StudyInstanceUID, item.SeriesInstanceUID = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=[series])
    item.InstanceNumber, item.SliceThickness = round(z_mm), 5.0
    item.ImagePositionPatient, item.ImageOrientationPatient = [-100.0, -120.0, z_mm], [1, 0, 0, 0, 1, 0]
    item.PixelSpacing, (item.Rows, item.Columns) = [4.5, 4.5], hu.shape
    item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
    item.RescaleSlope, item.RescaleIntercept = 1, -1024
    item.PixelData = (hu.astype(np.int32) + 1024).astype(np.uint16).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(item, name)
        else:
            setattr(item, name, value)
    return item


def write_series(folder: Path, hu: np.ndarray, names: list[str] | None = None, **changes) -> list[Path]:
    """Write [Z, Y, X] from the feet up as one file a slice, 5 mm apart."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z, plane in enumerate(hu):
        path = folder / (names[z] if names else f"IM{(7 * z) % len(hu):03d}")
        ct_slice(plane, 5.0 * z, **changes).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
