"""What a DICOM file says about itself, read without its pixels. Names and dates never leave this module unhashed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    OphthalmicPhotography8BitImageStorage,
    OphthalmicPhotography16BitImageStorage,
    OphthalmicTomographyImageStorage,
    UltrasoundImageStorage,
)

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.colour import is_colour, is_readable_colour
from meddino.volumes.dicom.elements import NO_DICOM, integer, number, read_elements, text
from meddino.volumes.dicom.frames import FRAME_TAGS, Frame, read_frames

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID", "PatientName", "PatientBirthDate",
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "InstanceNumber", "GantryDetectorTilt", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "BurnedInAnnotation", "PhotometricInterpretation",
    "ModalityLUTSequence", *FRAME_TAGS,
]  # fmt: skip
_REFORMATTED = {"MPR", "REFORMATTED", "CSA MPR", "PROJECTION IMAGE", "MIP", "MAX_IP", "MIN_IP", "MINIP", "VOLREN", "VRT", "SSD"}
_SCOUTS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"}
_VOLUME_KINDS = {
    CTImageStorage: "CT",
    EnhancedCTImageStorage: "CT",
    LegacyConvertedEnhancedCTImageStorage: "CT",
    MRImageStorage: "MR",
    EnhancedMRImageStorage: "MR",
    LegacyConvertedEnhancedMRImageStorage: "MR",
}
_PICTURE_KINDS = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    UltrasoundImageStorage,
    OphthalmicPhotography8BitImageStorage,
    OphthalmicPhotography16BitImageStorage,
    OphthalmicTomographyImageStorage,
}
# The standard's words for Modality (PS3.3, C.7.3.1.1.1): any other may be a name, and is not repeated.
_MODALITIES = {
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DOC", "DX", "ECG",
    "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LS",
    "M3D", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN",
    "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD",
    "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA",
    "XAPROTOCOL", "XC",
}  # fmt: skip
_HOUNSFIELD = {"", "HU", "US"}  # US: unspecified
_FLOAT = "DICOM: float pixel data, which is not read here"
_RESCALE_TYPES = {"OD", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"}  # the standard's other words


@dataclass(frozen=True)
class DicomHeader:
    """One file of a series.

    Attributes:
        path: The file.
        inside: Its path inside the source.
        modified: Differs when the file has changed.
        patient: Hash of the patient's id, name and birth date as written; tells patients apart, names nobody.
        patient_id: As written; only ever hashed with the salt.
        person: Hash of the name as DICOM compares names, "" without one; hash of the birth date, "" without one.
        study_uid: As written; only ever hashed with the salt.
        series_uid: As written; only ever hashed with the salt.
        instance_uid: As written; compared only.
        frame_of_reference: As written; compared only.
        kind: DICOM's name of the object.
        modality: "CT" or "MR", as the object's kind says; "" for an object that is no slice of such a volume.
        photometric: PhotometricInterpretation.
        refusal: Why this is no slice of a volume of its modality, or "".
        number: InstanceNumber, or 0.
        rows: Pixels.
        cols: Pixels.
        frames: One for a plain file; empty where refused.
        tilt_deg: Gantry tilt as the header says.
        picture: Why a picture (CR, DX, MG, US, OP, OPT) is of no use, or ""; None for another object.
    """

    path: Path
    inside: str
    modified: str
    patient: str
    patient_id: str
    person: tuple[str, str]
    study_uid: str
    series_uid: str
    instance_uid: str
    frame_of_reference: str
    kind: str
    modality: str
    photometric: str
    refusal: str
    number: int
    rows: int
    cols: int
    frames: tuple[Frame, ...]
    tilt_deg: float
    picture: str | None = None

    def why_not(self, modality: str) -> str:
        """Return why this is no slice of a volume of a modality (DICOM's code), or ""; never header text."""
        if self.modality == modality or "Secondary Capture" in self.kind:
            return self.refusal
        return f"DICOM: not {'an MR' if modality == 'MR' else f'a {modality}'} image but {self.kind}"


def read_header(path: Path, inside: str, modified: str) -> DicomHeader | None:
    """Read one file's header.

    An element without weight that is malformed (an instance number, a tilt, a thickness) counts as absent.

    Returns:
        None if the file is no DICOM, or its header is damaged.

    Raises:
        OSError: It cannot be read.
    """
    return read_elements(path, _TAGS, lambda dataset: _header(dataset, path, inside, modified))


def _header(dataset: Any, path: Path, inside: str, modified: str) -> DicomHeader | None:
    kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
    is_cut = "SOPClassUID" not in dataset and "Rows" not in dataset and kind in _VOLUME_KINDS
    if not kind or is_cut:
        return None
    who = "\x1f".join(text(dataset, name) for name in ("PatientID", "PatientName", "PatientBirthDate"))
    modality = _VOLUME_KINDS.get(kind, "")
    kind_name = kind.name if kind.name != str(kind) else "an unknown kind of object"
    refusal = _refusal(dataset, kind_name, modality)
    frames: tuple[Frame, ...] = ()
    if not refusal and modality:
        try:
            frames = read_frames(dataset)
        except VolumeError as error:
            refusal = str(error)
        except NO_DICOM:
            refusal = "DICOM: position, orientation or pixel spacing is missing or no number"
        strange = {frame.rescale_type for frame in frames} - _HOUNSFIELD
        if strange and modality == "CT":
            shown = min(strange) if min(strange) in _RESCALE_TYPES else "something else"  # never a header's own words
            refusal = f"DICOM: rescale type is {shown}, not HU"
    return DicomHeader(
        path=path,
        inside=inside,
        modified=modified,
        patient=_hash(who),
        patient_id=text(dataset, "PatientID"),
        person=(_hash(_person_name(text(dataset, "PatientName"))), _hash(text(dataset, "PatientBirthDate").strip())),
        study_uid=text(dataset, "StudyInstanceUID"),
        series_uid=text(dataset, "SeriesInstanceUID"),
        instance_uid=text(dataset, "SOPInstanceUID"),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
        kind=kind_name,
        modality=modality,
        photometric=text(dataset, "PhotometricInterpretation"),
        refusal=refusal,
        number=integer(dataset, "InstanceNumber"),
        rows=integer(dataset, "Rows"),
        cols=integer(dataset, "Columns"),
        frames=frames if not refusal else (),
        tilt_deg=number(dataset, "GantryDetectorTilt", most=90),
        picture=_picture_refusal(dataset) if kind in _PICTURE_KINDS else None,
    )


def _refusal(dataset: Any, kind: str, modality: str) -> str:
    """Return why a file is no slice of a volume; only words of ours and coded values, never header text."""
    said = text(dataset, "Modality")
    image_type = {part.strip().upper() for part in text(dataset, "ImageType").split("\\")}
    reasons = (
        ("Secondary Capture" in kind, "DICOM: secondary capture (may have text burned into the picture)"),
        (said not in (modality, ""), _modality_refusal(said)),
        (bool(image_type & _SCOUTS), "DICOM: localiser or scout"),
        (bool(image_type & _REFORMATTED), "DICOM: derived (reformatted, projected or rendered)"),
        (text(dataset, "BurnedInAnnotation").upper() == "YES", "DICOM: text is burned into the picture"),
        (integer(dataset, "SamplesPerPixel", 1) != 1, "DICOM: colour picture"),
        ("ModalityLUTSequence" in dataset and modality == "CT", "DICOM: its values go through a table, not a rescale to HU"),
        ("FloatPixelData" in dataset, _FLOAT),
        (integer(dataset, "Rows") < 1 or integer(dataset, "Columns") < 1, "DICOM: no pixels, or its header is truncated"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _modality_refusal(said: str) -> str:
    return f"DICOM: modality is {said}" if said in _MODALITIES else "DICOM: modality is unknown"


def _picture_refusal(dataset: Any) -> str:
    said = text(dataset, "Modality")
    reasons = (
        (said not in _MODALITIES and said != "", _modality_refusal(said)),
        ("FloatPixelData" in dataset, _FLOAT),
        (text(dataset, "BurnedInAnnotation").upper() == "YES", "DICOM: text is burned into the picture"),
        (is_colour(dataset) and not is_readable_colour(dataset), "DICOM: a kind of colour that is not read; export it as PNG"),
        (integer(dataset, "Rows") < 1 or integer(dataset, "Columns") < 1, "DICOM: no pixels, or its header is truncated"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _person_name(written: str) -> str:
    """Return a name as it is compared: letters' case, empty components and repeated blanks mean nothing."""
    groups = ["^".join(" ".join(part.split()) for part in group.split("^")).rstrip("^") for group in written.split("=")]
    return "=".join(groups).rstrip("=").casefold()


def _hash(words: str) -> str:
    return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest() if words else ""
