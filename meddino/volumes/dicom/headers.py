"""What a DICOM file says about itself, read without its pixels. Names and dates never leave this module unhashed."""

import hashlib
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID", "PatientName", "PatientBirthDate",
    "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "GantryDetectorTilt", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "BurnedInAnnotation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "DimensionOrganizationType",
]  # fmt: skip
_REFORMATTED = {"MPR", "REFORMATTED", "CSA MPR", "PROJECTION IMAGE", "MIP", "MAX_IP", "MIN_IP", "MINIP", "VOLREN", "VRT", "SSD"}
# pydicom raises each of these for bytes that only look like DICOM at first; a wrong length may ask for all the memory.
_NO_DICOM = (
    InvalidDicomError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, RecursionError,
    MemoryError, OverflowError, struct.error,
)  # fmt: skip
_CT_KINDS = (CTImageStorage, EnhancedCTImageStorage)
_MOST_THICKNESS_MM = 100.0
_SCOUTS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"}


@dataclass(frozen=True)
class Plane:
    """Where one slice lies: LPS millimetres, x y z.

    Attributes:
        position_mm: Centre of the first pixel.
        along_rows: Unit vector in which the column number grows.
        along_cols: Unit vector in which the row number grows.
        spacing_mm: Between rows, between columns.
        thickness_mm: As the header says; 0 if it does not.
    """

    position_mm: tuple[float, float, float]
    along_rows: tuple[float, float, float]
    along_cols: tuple[float, float, float]
    spacing_mm: tuple[float, float]
    thickness_mm: float


@dataclass(frozen=True)
class DicomHeader:
    """One file of a series.

    Attributes:
        path: The file.
        inside: Its path inside the source.
        stamp: Differs when the file has changed.
        patient: Hash of the patient's id, name and birth date as written; tells patients apart, names nobody.
        patient_id: As written; only ever hashed with the salt.
        study_uid: As written; only ever hashed with the salt.
        series_uid: As written; only ever hashed with the salt.
        instance_uid: As written; compared only.
        refusal: Why this is no slice of a CT volume, or "".
        number: InstanceNumber, or 0.
        pass_number: Tells several passes over the same positions apart (acquisition and temporal position).
        rows: Pixels.
        cols: Pixels.
        planes: One for a plain file, one a frame for a multi-frame file.
        tilt_deg: Gantry tilt as the header says.
    """

    path: Path
    inside: str
    stamp: str
    patient: str
    patient_id: str
    study_uid: str
    series_uid: str
    instance_uid: str
    refusal: str
    number: int
    pass_number: tuple[int, int]
    rows: int
    cols: int
    planes: tuple[Plane, ...]
    tilt_deg: float


def read_header(path: Path, inside: str, stamp: str) -> DicomHeader | None:
    """Read one file's header.

    An element without weight that is malformed (an instance number, a tilt, a thickness) counts as absent.

    Returns:
        None if the file is no DICOM, or its header is damaged.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with silent_pydicom():
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)
            kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
            is_cut = "SOPClassUID" not in dataset and "Rows" not in dataset and kind in _CT_KINDS
            return _header(dataset, kind, path, inside, stamp) if kind and not is_cut else None
    except _NO_DICOM:
        return None


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings to itself: they quote the values that they find wrong, names and ids among them."""
    logger = logging.getLogger("pydicom")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _header(dataset: Any, kind: Any, path: Path, inside: str, stamp: str) -> DicomHeader:
    who = "\x1f".join(_text(dataset, name) for name in ("PatientID", "PatientName", "PatientBirthDate"))
    refusal = _refusal(dataset, kind)
    planes: tuple[Plane, ...] = ()
    if not refusal:
        try:
            planes = _planes(dataset, kind)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):
            refusal = "DICOM: position, orientation or pixel spacing is missing or no number"
    return DicomHeader(
        path=path,
        inside=inside,
        stamp=stamp,
        patient=hashlib.sha256(who.encode("utf-8", "surrogateescape")).hexdigest(),
        patient_id=_text(dataset, "PatientID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        instance_uid=_text(dataset, "SOPInstanceUID"),
        refusal=refusal,
        number=_integer(dataset, "InstanceNumber"),
        pass_number=(_integer(dataset, "AcquisitionNumber"), _integer(dataset, "TemporalPositionIdentifier")),
        rows=_integer(dataset, "Rows"),
        cols=_integer(dataset, "Columns"),
        planes=planes,
        tilt_deg=_number(dataset, "GantryDetectorTilt", most=90),
    )


def _refusal(dataset: Any, kind: Any) -> str:
    """Return why a file is no slice of a CT volume; only words of ours and coded values, never header text."""
    modality = _text(dataset, "Modality")
    image_type = {part.strip().upper() for part in _text(dataset, "ImageType").split("\\")}
    kind_name = kind.name if kind.name != str(kind) else "an unknown kind of object"
    modality_name = modality if modality.isalpha() and len(modality) <= 4 else "not CT"
    reasons = (
        ("Secondary Capture" in kind_name, "DICOM: secondary capture (may have text burned into the picture)"),
        (kind not in _CT_KINDS, f"DICOM: not a CT image but {kind_name}"),
        (modality not in ("CT", ""), f"DICOM: modality is {modality_name}"),
        (bool(image_type & _SCOUTS), "DICOM: localiser or scout"),
        (bool(image_type & _REFORMATTED), "DICOM: derived (reformatted, projected or rendered)"),
        (_text(dataset, "BurnedInAnnotation").upper() == "YES", "DICOM: text is burned into the picture"),
        (_integer(dataset, "SamplesPerPixel", 1) != 1, "DICOM: colour picture"),
        (_integer(dataset, "Rows") < 1 or _integer(dataset, "Columns") < 1, "DICOM: no pixels, or its header is truncated"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _planes(dataset: Any, kind: Any) -> tuple[Plane, ...]:
    if kind != EnhancedCTImageStorage:
        return (
            _plane(
                dataset.ImagePositionPatient,
                dataset.ImageOrientationPatient,
                dataset.PixelSpacing,
                _number(dataset, "SliceThickness", most=_MOST_THICKNESS_MM),
            ),
        )
    shared = dataset.SharedFunctionalGroupsSequence[0]
    planes = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = _group(frame, shared, "PlanePositionSequence")
        orientation = _group(frame, shared, "PlaneOrientationSequence")
        measures = _group(frame, shared, "PixelMeasuresSequence")
        planes.append(
            _plane(
                position.ImagePositionPatient,
                orientation.ImageOrientationPatient,
                measures.PixelSpacing,
                _number(measures, "SliceThickness", most=_MOST_THICKNESS_MM),
            )
        )
    return tuple(planes)


def _group(frame: Any, shared: Any, name: str) -> Any:
    return (frame if name in frame else shared)[name][0]


def _plane(position: Any, orientation: Any, spacing: Any, thickness_mm: float) -> Plane:
    x, y, z = (float(value) for value in position)
    directions = [float(value) for value in orientation]
    first, second = np.asarray(directions[:3]), np.asarray(directions[3:6])
    rows_mm, cols_mm = (float(value) for value in spacing)
    finite = np.isfinite([x, y, z, *directions, rows_mm, cols_mm]).all()
    if not finite or min(rows_mm, cols_mm) <= 0 or min(np.linalg.norm(first), np.linalg.norm(second)) < 0.5:
        raise ValueError("not a plane")
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    if abs(float(first @ second)) > 0.05:
        raise ValueError("rows and columns are not at right angles")
    return Plane((x, y, z), _triple(first), _triple(second), (rows_mm, cols_mm), thickness_mm)


def _triple(vector: Any) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])


def _integer(dataset: Any, name: str, default: int = 0) -> int:
    return int(_number(dataset, name, default))


def _number(dataset: Any, name: str, default: float = 0, most: float = math.inf) -> float:
    """Return an element's number; the default where it is absent, several, none, or larger than it can be.

    What is written into manifests must be a measure: anything else in such an element may be a date or an id.
    """
    try:
        value = float(dataset.get(name))  # pydicom converts on access
    except (TypeError, ValueError, OverflowError):
        return default
    return value if math.isfinite(value) and abs(value) <= most else default


def _text(dataset: Any, name: str) -> str:
    """Return an element's words, several of them with backslashes between; "" where it is absent or cannot be read."""
    try:
        value = dataset.get(name)
    except (TypeError, ValueError, LookupError):
        return ""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
