"""Small DICOM files for tests."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)  # fmt: skip


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


def enhanced_ct(hu: np.ndarray, order: list[int] | None = None, step_mm: float = 2.0, **changes) -> FileDataset:
    """One multi-frame file of [Z, Y, X] from the feet up; `order` is the order in which the frames are stored."""
    order = list(range(len(hu))) if order is None else order
    item = ct_slice(hu[0], 0.0, SOPClassUID=EnhancedCTImageStorage)
    item.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(item, name)
    measures, orientation, rescale, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.8], step_mm
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    del item.RescaleSlope, item.RescaleIntercept
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [rescale]
    frames = []
    for z in order:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [-100.0, -120.0, step_mm * z]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    item.NumberOfFrames, item.SharedFunctionalGroupsSequence = len(hu), [shared]
    item.PerFrameFunctionalGroupsSequence = frames
    item.PixelData = b"".join((hu[z].astype(np.int32) + 1024).astype(np.uint16).tobytes() for z in order)
    for name, value in changes.items():
        setattr(item, name, value)
    return item


def write_enhanced(path: Path, hu: np.ndarray, order: list[int] | None = None) -> None:
    """Write one multi-frame file."""
    enhanced_ct(hu, order).save_as(path, enforce_file_format=True)


def rtstruct(path, contours, kind="CLOSED_PLANAR") -> None:
    """Write an RTSTRUCT; contours: name -> list of points [n, 3] in mm (LPS)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID, item.Modality = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID, "RTSTRUCT"
    item.StructureSetROISequence, item.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(contours.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = number, name, number, []
        for points in polygons:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.6f}" for value in np.asarray(points).ravel()]
            drawn.ContourSequence.append(contour)
        item.StructureSetROISequence.append(roi)
        item.ROIContourSequence.append(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    item.save_as(path, enforce_file_format=True)


def in_mm(grid, z, corners) -> np.ndarray:
    """(row, col) corners of a slice as patient positions, by the definition of the grid."""
    voxels = np.array([(z, row, col) for row, col in corners])
    return np.asarray(grid.origin_mm) + (voxels * np.asarray(grid.spacing_mm)) @ grid.axes
