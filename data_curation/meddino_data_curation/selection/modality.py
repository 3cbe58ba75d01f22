"""What a volume's numbers are: recognised by the rules of its modality, or refused with the reason."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.data.intensity import MEMBERS, OF_DICOM_CODE, Modality
from meddino.data.stored_values import percentile_range, stored_type, value_range
from meddino.volumes.dicom.pixels import FRACTION_HU, ROUNDED
from meddino_data_curation.config import HounsfieldConfig
from meddino_data_curation.selection.hounsfield import (
    looks_like_hounsfield,
    recognise_hounsfield,
    refuse_unfinite,
    spread_sample,
)

SourceModality = Modality | Literal["auto"]
PICTURE = "picture"
"""Stands where DICOM has the code of a modality, for files that hold a picture; the format of such candidates."""
_MIN_VALUES = 33  # fewer different ones are labels, whatever their size
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Recognised:
    """What a volume's numbers are.

    Attributes:
        modality: What they mean.
        offset: Added to every voxel to get Hounsfield units; 0 for another modality.
        value_range: Values that become 0 and 1; None for CT.
        note: What was repaired, or "".
    """

    modality: Modality
    offset: int = 0
    value_range: tuple[float, float] | None = None
    note: str = ""

    def stored(self, plane: NDArray[Any]) -> NDArray[Any]:
        """Return one slice as it is stored: CT as int16 HU, rounded and clipped; others without a change of values.

        Args:
            plane: [rows, cols] or [rows, cols, 3], any real type.
        """
        if self.modality != "ct":
            return np.ascontiguousarray(plane, dtype=stored_type(plane.dtype))
        if plane.dtype == np.int16 and self.offset == 0:
            return np.ascontiguousarray(plane)
        wide = plane.astype(np.float64) + self.offset
        return np.ascontiguousarray(np.clip(np.rint(wide), _INT16.min, _INT16.max), dtype=np.int16)

    def as_soft_tissue(self, stored: NDArray[Any]) -> NDArray[np.int16]:
        """Return a grey slice in which a range of any unit lies where CT has soft tissue: for thumbnails and fingerprints."""
        if self.value_range is None:
            return stored
        grey = stored if stored.ndim == 2 else stored.mean(axis=-1)
        low, high = self.value_range
        unit = np.clip((grey.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)
        shown: NDArray[np.int16] = np.rint(unit * 400 - 160).astype(np.int16)
        return shown


def recognise(voxels: NDArray[Any], wanted: SourceModality, code: str, config: HounsfieldConfig) -> Recognised:
    """Tell what voxels are.

    Args:
        voxels: [Z, Y, X], of colour pictures [Z, Y, X, 3]; any real type.
        wanted: What the source says they are; auto: the file's own word, and CT by its histogram where it has none.
        code: DICOM's code of the modality, PICTURE for a picture file, "" where the file says nothing.
        config: How Hounsfield units are recognised.

    Raises:
        VolumeError: It is another modality than wanted, or nothing that can be used; the message says what.
    """
    said = _picture_of(wanted) if code == PICTURE else OF_DICOM_CODE.get(code)
    if code and said is None:
        raise VolumeError(f"DICOM: modality is {code if code.isalpha() and len(code) <= 4 else 'unknown'}")
    modality = (said or "ct") if wanted == "auto" else wanted
    if said is not None and said != modality:
        raise VolumeError(f"the source says modality {modality}, the file is {MEMBERS[said].values_are}")
    if modality == "ct":
        verdict = recognise_hounsfield(voxels, config)
        notes = (verdict.note, _beyond_int16(voxels, verdict.offset), _fractions(voxels))
        return Recognised("ct", verdict.offset, None, "; ".join(filter(None, notes)))
    if voxels.dtype.kind not in "iuf":
        raise VolumeError(f"voxels are {voxels.dtype}; intensities are numbers")
    if voxels.dtype.kind == "f":
        refuse_unfinite(voxels)
    if MEMBERS[modality].units == "brightness":
        return _recognise_brightness(voxels, modality, has_range=code in ("", PICTURE))
    return _recognise_arbitrary(voxels, modality, said)


def _beyond_int16(voxels: NDArray[Any], offset: int) -> str:
    """Return a note on values that int16 does not hold once they are Hounsfield units, or ""."""
    if np.can_cast(voxels.dtype, np.int16) and offset == 0:
        return ""
    low, high = float(voxels.min()) + offset, float(voxels.max()) + offset
    if _INT16.min <= round(low) and round(high) <= _INT16.max:
        return ""
    return f"values of {low:g} to {high:g} HU, stored as int16, clipped"


def _fractions(voxels: NDArray[Any]) -> str:
    """Return a note on Hounsfield units that are no whole numbers, told by a sample, or ""."""
    if voxels.dtype.kind != "f":
        return ""
    sample = spread_sample(voxels)
    off = float(np.abs(sample - np.rint(sample)).max())
    return ROUNDED if off > FRACTION_HU else ""


def _picture_of(wanted: SourceModality) -> Modality:
    """Return what a picture file says it is: of the modality that is wanted, where that has brightness."""
    return wanted if wanted != "auto" and MEMBERS[wanted].units == "brightness" else "image"


def _recognise_arbitrary(voxels: NDArray[Any], modality: Modality, said: Modality | None) -> Recognised:
    sample = spread_sample(voxels)
    _refuse_labels(sample)
    if said is None and sample.min() < 0 and looks_like_hounsfield(sample):
        raise VolumeError(f"the source says modality {modality}, its values look like CT in Hounsfield units")
    notes = []
    low, high = value_range(modality, sample)
    if stored_type(voxels.dtype) == np.float32 and voxels.dtype.kind in "iu" and np.abs(sample).max() > 2**24:
        notes.append("whole numbers beyond 2^24 stored as float32, rounded")
    if voxels.dtype == np.float64:
        notes.append("float64 stored as float32, rounded")
    return Recognised(modality, 0, (low, high), "; ".join(notes))


def _recognise_brightness(voxels: NDArray[Any], modality: Modality, has_range: bool) -> Recognised:
    if voxels.dtype not in (np.uint8, np.uint16):
        raise VolumeError(f"values are {voxels.dtype}; a picture has 8 or 16 bits of brightness")
    sample = spread_sample(voxels)
    if sample.min() == sample.max():
        raise VolumeError(f"every pixel is {sample.min():g}: a blank picture")
    # DICOM's types are wider than what is shown: its own percentiles say where black and white are.
    return Recognised(modality, 0, value_range(modality, voxels) if has_range else percentile_range(sample))


def _refuse_labels(sample: NDArray[np.float64]) -> None:
    low, high = float(sample.min()), float(sample.max())
    different = len(np.unique(sample))
    if different == 1:
        raise VolumeError(f"every voxel is {low:g}")
    if different < min(_MIN_VALUES, max(3, sample.size // 2)):
        what = "a binary mask" if different == 2 else "a label map"
        raise VolumeError(f"looks like {what}: {different} different values from {low:g} to {high:g}")
