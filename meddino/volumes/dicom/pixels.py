"""The pixels of a DICOM stack as values: rescaled slice by slice, padding taken out, positions kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.dicom.frames import Frame
from meddino.volumes.dicom.stacking import DicomStack, StackedSlice
from meddino.volumes.dicom.stored_values import StoredFrames, open_frames
from meddino.volumes.geometry import Geometry
from meddino.volumes.limits import ReadLimits
from meddino.volumes.volume import Volume

OUTSIDE_HU = -1024
FRACTION_HU = 1e-2
"""Less is the rounding of a rescale."""
ROUNDED = "values with fractions of HU rounded to whole HU"
"""A note on a volume that is stored as int16."""
_MAX_UNREADABLE_FRACTION = 0.5
_MAX_UNSCALED_FRACTION = 0.02
_UNEVEN_FRACTION = 0.05
_SHIFT_PX = 0.5
_INT16 = np.iinfo(np.int16)
_PADDING_ABOVE_HU = -1000  # padding between here and the next line lies among real values and is left alone
_PADDING_BELOW_HU = 4096


def read_dicom_volume(stack: DicomStack, limits: ReadLimits) -> Volume:
    """Read a stack of slices; CT in Hounsfield units as int16, other modalities as they are stored and rescaled.

    Slices that cannot be read are left out and counted in the notes; so are gaps. Positions stay true.

    Raises:
        VolumeError: It is no volume, too large, more than half of the slices cannot be read, or their rescale is not told.
        MemoryError: There is not enough memory for it.
        OSError: The system cannot read a file.
    """
    if stack.problem:
        raise VolumeError(stack.problem)
    stack = _only_scaled(stack)
    count = len(stack.slices)
    voxels = count * stack.rows * stack.cols
    if voxels > limits.max_volume_voxels or max(stack.rows, stack.cols, count) > limits.max_axis_px:
        raise VolumeError(f"{voxels} voxels; limits.max_volume_voxels is {limits.max_volume_voxels}")
    held = _Held(stack)
    for stacked, stored, bits in _stored(stack):
        held.add(stacked, stored, bits)
    lost = count - len(held.kept)
    if lost > _MAX_UNREADABLE_FRACTION * count:
        raise VolumeError(f"DICOM: {lost} of {count} slices cannot be read (truncated, damaged or an unknown compression)")
    notes = stack.notes + held.notes() + ((f"{lost} slices cannot be read",) if lost else ())
    return _volume(held.voxels[: len(held.kept)], held.kept, notes, stack)


def _only_scaled(stack: DicomStack) -> DicomStack:
    """Leave out the slices without a rescale where the others have one: their values are in other units.

    Raises:
        VolumeError: They are more than a few.
    """
    unscaled = [item.frame.scale is None for item in stack.slices]
    if not any(unscaled) or all(item.frame.scale in (None, (1.0, 0.0)) for item in stack.slices):
        return stack
    count = sum(unscaled)
    if count > _MAX_UNSCALED_FRACTION * len(unscaled):
        rescale = "rescale to HU" if stack.modality == "CT" else "rescale"
        raise VolumeError(f"DICOM: {count} of {len(unscaled)} slices lack the {rescale} that the others have")
    kept = tuple(item for item, is_unscaled in zip(stack.slices, unscaled, strict=True) if not is_unscaled)
    note = f"{count} slices without rescale left out"
    return DicomStack(
        stack.files, kept, stack.rows, stack.cols, stack.modality, stack.photometric, (*stack.notes, note), stack.problem
    )


class _Held:
    """The volume as far as it has been read, and what happened on the way."""

    def __init__(self, stack: DicomStack) -> None:
        self.is_ct = stack.modality == "CT"
        scales = {item.frame.scale or (1.0, 0.0) for item in stack.slices}
        self.voxels: NDArray[Any] = np.empty(
            (len(stack.slices), stack.rows, stack.cols), np.int16 if self.is_ct else _lean_type(scales)
        )
        self.kept: list[StackedSlice] = []
        self.padding: set[int] = set()
        self.padding_left: set[int] = set()
        self.clipped = 0  # voxels
        self.is_rounded = False

    def add(self, stacked: StackedSlice, stored: NDArray[Any] | None, bits: int) -> None:
        """Put the next slice in its place, unless it could not be read."""
        if stored is None:
            return
        if stored.shape != self.voxels.shape[1:]:
            raise VolumeError(
                f"DICOM: slice {len(self.kept)} has {list(stored.shape)} pixels, its header says {list(self.voxels.shape[1:])}"
            )
        values = _rescaled(stored, stacked.frame)
        outside = _padded(stored, stacked.frame, bits)
        if self.is_ct and (values.min() < _INT16.min or values.max() > _INT16.max):
            beyond = (np.rint(values) < _INT16.min) | (np.rint(values) > _INT16.max)
            self.clipped += int(np.count_nonzero(beyond if outside is None else beyond & ~outside))
        target = self.voxels[len(self.kept)]
        if self.is_ct and values.dtype.kind == "f":
            whole = np.rint(values)
            self.is_rounded = self.is_rounded or bool(np.abs(values - whole).max() > FRACTION_HU)
            target[:] = np.clip(whole, _INT16.min, _INT16.max)
        elif self.is_ct:
            target[:] = _clipped(values)
        else:
            target[:] = values
        if outside is not None and outside.any():
            self._fill(target, values, outside)
        self.kept.append(stacked)

    def _fill(self, target: NDArray[Any], values: NDArray[Any], outside: NDArray[np.bool_]) -> None:
        value = round(float(values[outside].flat[0]))
        if not self.is_ct:
            target[outside] = target[~outside].min() if not outside.all() else 0
            self.padding.add(value)
        elif _PADDING_ABOVE_HU < value < _PADDING_BELOW_HU:
            self.padding_left.add(value)
        else:
            target[outside] = OUTSIDE_HU
            if value != OUTSIDE_HU:
                self.padding.add(value)

    def notes(self) -> tuple[str, ...]:
        """Return what was done to padding, and to what int16 does not hold."""
        notes: tuple[str, ...] = (ROUNDED,) if self.is_rounded else ()
        if self.clipped:
            notes += (f"{self.clipped} voxels beyond {_INT16.min} to {_INT16.max} HU clipped",)
        if self.padding:
            to = f"{OUTSIDE_HU} HU" if self.is_ct else "the lowest value"
            notes += (f"padding ({min(self.padding)} after rescale) set to {to}",)
        if self.padding_left:
            notes += (f"padding value lies at {min(self.padding_left)} HU, among real values: left as it is",)
        return notes


def _lean_type(scales: set[tuple[float, float]]) -> type[np.generic]:
    return np.int32 if scales == {(1.0, 0.0)} else np.float32


def _clipped(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype in (np.int16, np.int8, np.uint8) else np.asarray(np.clip(values, _INT16.min, _INT16.max))


def _rescaled(stored: NDArray[Any], frame: Frame) -> NDArray[Any]:
    slope, intercept = frame.scale or (1.0, 0.0)
    whole = slope == int(slope) and intercept == int(intercept)
    values: NDArray[Any] = stored.astype(np.int64 if whole else np.float64)
    values *= values.dtype.type(slope)
    values += values.dtype.type(intercept)
    return values


def _padded(stored: NDArray[Any], frame: Frame, bits: int) -> NDArray[np.bool_] | None:
    """Return where nothing was measured: -2000 may stand there as 63536, so the bits are compared."""
    if frame.padding is None or not 1 <= bits <= 32:
        return None
    mask = (1 << bits) - 1
    first, last = frame.padding
    if first == last:
        return np.asarray((stored.astype(np.int64) & mask) == (first & mask))
    low, high = min(first, last), max(first, last)
    return np.asarray((stored >= low) & (stored <= high))


def _opened(path: Path) -> StoredFrames | None:
    try:
        return open_frames(path)
    except OSError as error:
        cause_without_path(error)  # raises where it is the system's; a file that has gone is a slice that cannot be read
        return None
    except VolumeError:
        return None  # so is one whose archive is damaged


def _stored(stack: DicomStack) -> Iterator[tuple[StackedSlice, NDArray[Any] | None, int]]:
    opened = -1
    frames: StoredFrames | None = None
    for stacked in stack.slices:
        if stacked.file != opened:
            opened, frames = stacked.file, _opened(stack.files[stacked.file])
        yield stacked, frames[stacked.frame.number] if frames is not None else None, frames.bits if frames is not None else 0


def _volume(voxels: NDArray[Any], stack: list[StackedSlice], notes: tuple[str, ...], source: DicomStack) -> Volume:
    first = stack[0].plane
    rows, cols = np.asarray(first.along_rows), np.asarray(first.along_cols)
    normal = np.cross(rows, cols)
    moved = np.array([np.subtract(item.plane.position_mm, first.position_mm) for item in stack])
    places = moved @ normal
    steps = np.diff(places)
    step = float(np.median(steps)) if len(steps) else (first.thickness_mm or 1.0)
    uneven = len(steps) > 0 and bool(np.abs(steps - step).max() > max(_UNEVEN_FRACTION * step, 0.02))
    irregular = ""
    if uneven:
        missing = int(np.maximum(np.rint(steps / step) - 1, 0).sum())
        irregular = f"{missing} slices are missing" if missing else "slice distance is uneven"
        notes += (irregular,)
    across = np.abs(moved @ np.stack([rows, cols], axis=1)).max(axis=0) / np.asarray(first.spacing_mm[::-1])
    if across.max() > _SHIFT_PX:
        notes += (f"slices are shifted inside their plane by up to {across.max():.1f} pixels",)
        irregular = irregular or notes[-1]
    geometry = Geometry(
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=(step, *first.spacing_mm),
        origin_mm=first.position_mm,
        axes=np.array([normal, cols, rows]),
    )
    return Volume(
        voxels,
        geometry,
        tuple(places.tolist()) if uneven else None,
        notes,
        modality=source.modality,
        photometric=source.photometric,
        irregular=irregular,
    )
