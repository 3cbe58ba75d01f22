"""The frames of a DICOM file: where each lies, how its values are scaled, and what tells it from others at its place."""

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.elements import NO_DICOM, integer, number, text

_MOST_THICKNESS_MM = 100.0
_LEAST_LENGTH = 0.5  # of a direction, which should be 1
_MOST_LENGTH_OFF = 0.01  # more is no rounding
_MOST_COSINE = 0.05
# What may differ between two pictures of one place, most telling first: by name, where a plain file has it, and in which
# group of a multi-frame file it stands.
_TELLING = (
    ("AcquisitionNumber", "FrameContentSequence", "FrameAcquisitionNumber"),
    ("TemporalPositionIdentifier", "FrameContentSequence", "TemporalPositionIndex"),
    ("StackID", "FrameContentSequence", "StackID"),
    ("AcquisitionUID", "", ""),
    ("KVP", "CTExposureSequence", ""),
    ("ConvolutionKernel", "CTReconstructionSequence", "ConvolutionKernel"),
    ("ImageType", "CTImageFrameTypeSequence", "FrameType"),
    ("EchoNumbers", "", ""),
    ("EchoTime", "MREchoSequence", "EffectiveEchoTime"),
    ("DiffusionBValue", "MRDiffusionSequence", "DiffusionBValue"),
    ("InversionTime", "", ""),
    ("FlipAngle", "", ""),
    ("NominalPercentageOfCardiacPhase", "CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
    ("TriggerTime", "", ""),
    ("ReconstructionDiameter", "CTReconstructionSequence", "ReconstructionDiameter"),
    ("SliceThickness", "PixelMeasuresSequence", "SliceThickness"),
    ("ContrastBolusAgent", "", ""),
    ("SeriesDescription", "", ""),
    ("SeriesNumber", "", ""),
    ("ImageComments", "FrameContentSequence", "FrameComments"),
    ("ProtocolName", "", ""),
    ("AcquisitionDateTime", "FrameContentSequence", "FrameAcquisitionDateTime"),
    ("AcquisitionTime", "", ""),
    ("ContentTime", "FrameContentSequence", "FrameReferenceDateTime"),
)
TELLING_NAMES = (*(name for name, _, _ in _TELLING), "in-plane origin")
FRAME_TAGS = [
    *dict.fromkeys(name for name, _, _ in _TELLING), "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Where one slice lies: LPS millimetres, x y z.

    Attributes:
        position_mm: Centre of the first pixel.
        along_rows: Unit vector in which the column number grows.
        along_cols: Unit vector in which the row number grows.
        spacing_mm: Between rows, between columns.
        thickness_mm: As the header says; 0 if it does not.
        is_normalised: The header's directions are not of length 1.
    """

    position_mm: tuple[float, float, float]
    along_rows: tuple[float, float, float]
    along_cols: tuple[float, float, float]
    spacing_mm: tuple[float, float]
    thickness_mm: float
    is_normalised: bool = False

    def along_normal_mm(self, reference: "Plane") -> float:
        """Return the position along the normal of a parallel plane."""
        return float(np.dot(np.cross(reference.along_rows, reference.along_cols), self.position_mm))


@dataclass(frozen=True)
class Frame:
    """One picture of a file.

    Attributes:
        number: In the file, from 0.
        plane: Where it lies.
        scale: Rescale slope and intercept, None where the file has none; the slope is not 0.
        rescale_type: As the header says; "" if it does not.
        padding: Stored values from and to which mean that nothing was measured; None if the header names none.
        telling: Of `TELLING_NAMES`, as text or its hash, "" where absent.
        is_half_scaled: The file has only one of slope and intercept.
        is_placed_by_spacing: The file gives the place of its first frame only.
    """

    number: int
    plane: Plane
    scale: tuple[float, float] | None
    rescale_type: str
    padding: tuple[int, int] | None
    telling: tuple[str, ...]
    is_half_scaled: bool = False
    is_placed_by_spacing: bool = False


def read_frames(dataset: Any) -> tuple[Frame, ...]:
    """Read what a header says of each frame: as many as it counts.

    Raises:
        VolumeError: A multi-frame file describes more or fewer frames than it counts, or gives its frames no distance; a
            rescale slope is 0; position, orientation or pixel spacing are numbers that are no plane's.
        ValueError, TypeError, AttributeError, IndexError, KeyError: Position, orientation or pixel spacing is missing or no
            number.
    """
    padding = _padding(dataset)
    per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    count = max(integer(dataset, "NumberOfFrames", 1), 1)
    if per_frame or dataset.get("SharedFunctionalGroupsSequence"):
        if len(per_frame) != count:
            raise VolumeError(f"DICOM: NumberOfFrames is {count}, the header describes {len(per_frame)} frames")
        return _functional_groups(dataset, per_frame, padding)
    thickness = number(dataset, "SliceThickness", most=_MOST_THICKNESS_MM)
    first = make_plane(dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing, thickness)
    told = _told(lambda name, group, inside: text(dataset, name), first)
    kind = text(dataset, "RescaleType").strip().upper()
    frame = Frame(0, first, _scale(dataset), kind, padding, told, _is_half_scaled(dataset))
    if count == 1:
        return (frame,)
    step = abs(number(dataset, "SpacingBetweenSlices", most=_MOST_THICKNESS_MM)) or thickness
    if step <= 0:
        raise VolumeError("DICOM: its frames have neither positions, nor a distance (SpacingBetweenSlices, SliceThickness)")
    normal = np.cross(first.along_rows, first.along_cols)
    return tuple(_moved(frame, index, _triple(np.asarray(first.position_mm) + index * step * normal)) for index in range(count))


def _moved(frame: Frame, index: int, position: tuple[float, float, float]) -> Frame:
    return replace(frame, number=index, plane=replace(frame.plane, position_mm=position), is_placed_by_spacing=True)


def _functional_groups(dataset: Any, per_frame: list[Any], padding: tuple[int, int] | None) -> tuple[Frame, ...]:
    shared = dataset.SharedFunctionalGroupsSequence[0] if dataset.get("SharedFunctionalGroupsSequence") else {}
    frames = []
    for index, groups in enumerate(per_frame):
        position, orientation, measures = (
            _group(groups, shared, name)
            for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        thickness = number(measures, "SliceThickness", most=_MOST_THICKNESS_MM)
        plane = make_plane(position.ImagePositionPatient, orientation.ImageOrientationPatient, measures.PixelSpacing, thickness)
        values = _group_or_none(groups, shared, "PixelValueTransformationSequence")
        scaling = values if values is not None and _scale(values) is not None else dataset

        def look(name: str, group: str, inside: str, groups: Any = groups) -> str:
            found = _group_or_none(groups, shared, group) if group else None
            return text(found, inside or name) if found is not None else ""

        kind = text(values if values is not None else dataset, "RescaleType").strip().upper()
        frames.append(
            Frame(index, plane, _scale(scaling), kind, padding, _told(look, plane), is_half_scaled=_is_half_scaled(scaling))
        )
    return tuple(frames)


def _told(look: Callable[[str, str, str], str], plane: Plane) -> tuple[str, ...]:
    """Return the telling facts; words only as their hash, for a comment may say a name."""
    values = [_plain(look(*where)) for where in _TELLING]
    across = [float(np.dot(vector, plane.position_mm)) for vector in (plane.along_rows, plane.along_cols)]
    return (*values, f"{across[0]:.1f} {across[1]:.1f}")


def _plain(value: str) -> str:
    try:
        return sys.intern(f"{float(value):020.6f}") if value else ""  # so that text sorts as numbers do
    except ValueError:
        return sys.intern(hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()[:16])


def _group(groups: Any, shared: Any, name: str) -> Any:
    return (groups if name in groups else shared)[name][0]


def _group_or_none(groups: Any, shared: Any, name: str) -> Any:
    found = groups.get(name) or shared.get(name)
    return found[0] if found else None


def _scale(dataset: Any) -> tuple[float, float] | None:
    """Return slope and intercept; None where there is neither, or where one is there and is no number.

    Raises:
        VolumeError: The slope is 0, which makes all pixels one value: whatever they mean, it is not in the file.
    """
    slope, intercept = _number_if_there(dataset, "RescaleSlope"), _number_if_there(dataset, "RescaleIntercept")
    if slope is None and intercept is None:
        return None
    if slope == 0:
        raise VolumeError("DICOM: rescale slope is 0")
    scale = 1.0 if slope is None else slope, intercept or 0.0
    return None if math.isnan(sum(scale)) else scale


def _is_half_scaled(dataset: Any) -> bool:
    return (_number_if_there(dataset, "RescaleSlope") is None) != (_number_if_there(dataset, "RescaleIntercept") is None)


def _number_if_there(dataset: Any, name: str) -> float | None:
    """Return an element's number: None where it is absent or empty, `math.nan` where it is no number."""
    try:
        is_there = dataset.get(name) not in (None, "")
    except NO_DICOM:
        is_there = True
    return number(dataset, name, math.nan) if is_there else None


def _padding(dataset: Any) -> tuple[int, int] | None:
    if dataset.get("PixelPaddingValue") is None:
        return None
    first = integer(dataset, "PixelPaddingValue")
    return first, integer(dataset, "PixelPaddingRangeLimit", first)


def make_plane(position: Any, orientation: Any, spacing: Any, thickness_mm: float) -> Plane:
    """Return a plane from a header's values.

    Raises:
        VolumeError: They are numbers, but no plane's; it says which: where something lies names nobody.
        ValueError, TypeError: They are missing, or no numbers.
    """
    x, y, z = (float(value) for value in position)
    directions = [float(value) for value in orientation]
    first, second = np.asarray(directions[:3]), np.asarray(directions[3:6])
    rows_mm, cols_mm = (float(value) for value in spacing)
    if not np.isfinite([x, y, z, *directions, rows_mm, cols_mm]).all():
        raise ValueError("not a plane")
    if min(rows_mm, cols_mm) <= 0:
        raise VolumeError(f"DICOM: pixel spacing is {rows_mm:g} and {cols_mm:g} mm; must be above 0")
    lengths = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    shown = ", ".join(f"{value:.4g}" for value in directions)
    if min(lengths) < _LEAST_LENGTH:
        raise VolumeError(f"DICOM: orientation is {shown}; must be two directions of length 1")
    first, second = first / lengths[0], second / lengths[1]
    if abs(float(first @ second)) > _MOST_COSINE:
        raise VolumeError(f"DICOM: orientation is {shown}; rows and columns must be at right angles")
    is_normalised = max(abs(length - 1) for length in lengths) > _MOST_LENGTH_OFF
    return Plane((x, y, z), _triple(first), _triple(second), (rows_mm, cols_mm), thickness_mm, is_normalised)


def _triple(vector: Any) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])
