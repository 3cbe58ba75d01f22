"""One DICOM file from its elements and pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

_IMPLEMENTATION_UID = "1.2.826.0.1.3680043.8.498.1"  # below pydicom's root, which anybody may use


def uid_of(*words: str) -> str:
    """Return the same UID for the same words."""
    return str(generate_uid(entropy_srcs=list(words)))


def write_ct_slice(path: Path, elements: Mapping[str, Any], stored: NDArray[np.uint16]) -> None:
    """Write one slice of CT Image Storage.

    Args:
        path: File.
        elements: By keyword; SOPInstanceUID among them, those of the pixels not.
        stored: [rows, cols], values as stored, up to 12 bits.
    """
    _write_picture(path, CTImageStorage, "CT", elements, stored)


def write_radiograph(path: Path, elements: Mapping[str, Any], stored: NDArray[np.uint16]) -> None:
    """Write one picture of Digital X-Ray Image Storage; arguments as those of `write_ct_slice`."""
    _write_picture(path, DigitalXRayImageStorageForPresentation, "DX", elements, stored)


def _write_picture(path: Path, sop_class: str, modality: str, elements: Mapping[str, Any], stored: NDArray[np.uint16]) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, elements["SOPInstanceUID"]
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, _IMPLEMENTATION_UID
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.Modality = sop_class, modality
    for name, value in elements.items():
        setattr(dataset, name, value)
    (dataset.Rows, dataset.Columns), dataset.SamplesPerPixel = stored.shape, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = stored.tobytes()
    dataset.save_as(path, enforce_file_format=True)
