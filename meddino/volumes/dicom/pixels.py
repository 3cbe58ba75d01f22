"""The pixels of a DICOM stack, file by file through SimpleITK's GDCM, in Hounsfield units."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.frames import Frames, open_frames
from meddino.volumes.dicom.grouping import DicomStack, StackedSlice
from meddino.volumes.geometry import Geometry
from meddino.volumes.itk_files import raise_if_memory_ran_out
from meddino.volumes.limits import ReadLimits
from meddino.volumes.volume import Volume

_MAX_UNREADABLE_FRACTION = 0.5
_WRONG = (OSError, ValueError, TypeError, AttributeError, KeyError)  # what pydicom raises for damaged files
_UNEVEN_FRACTION = 0.05
_INT16 = np.iinfo(np.int16)


def read_dicom_volume(stack: DicomStack, limits: ReadLimits) -> Volume:
    """Read a stack of slices.

    Slices that cannot be read are left out and counted in the notes; so are gaps. Positions stay true.

    Raises:
        VolumeError: Too large, or more than half of the slices cannot be read.
        MemoryError: There is not enough memory for it.
    """
    count = len(stack.slices)
    voxels = count * stack.rows * stack.cols
    if voxels > limits.max_volume_voxels or max(stack.rows, stack.cols, count) > limits.max_axis_px:
        raise VolumeError(f"{voxels} voxels; limits.max_volume_voxels is {limits.max_volume_voxels}")
    hu = np.empty((count, stack.rows, stack.cols), dtype=np.int16)
    kept: list[StackedSlice] = []
    for index, stacked, pixels in _decoded(stack):
        if pixels is None:
            continue
        if pixels.shape != hu.shape[1:]:
            raise VolumeError(f"DICOM: slice {index} has {list(pixels.shape)} pixels, its header says {list(hu.shape[1:])}")
        hu[len(kept)] = np.clip(np.rint(pixels), _INT16.min, _INT16.max) if pixels.dtype.kind == "f" else _clipped(pixels)
        kept.append(stacked)
    lost = count - len(kept)
    if lost > _MAX_UNREADABLE_FRACTION * count:
        raise VolumeError(f"DICOM: {lost} of {count} slices cannot be read (truncated, damaged or an unknown compression)")
    notes = (f"{lost} slices cannot be read",) if lost else ()
    return _volume(hu[: len(kept)], kept, stack.notes + notes)


def _clipped(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels if pixels.dtype in (np.int16, np.int8, np.uint8) else np.asarray(np.clip(pixels, _INT16.min, _INT16.max))


def _decoded(stack: DicomStack) -> Iterator[tuple[int, StackedSlice, NDArray[Any] | None]]:
    several = len({item.frame for item in stack.slices}) > 1
    opened, block, owner = -1, None, None
    for index, stacked in enumerate(stack.slices):
        if stacked.file != opened:  # a multi-frame file is read once
            block = owner = None  # two multi-frame files are never held at once
            opened, (block, owner) = stacked.file, _open_file(stack.files[stacked.file], several)
        yield index, stacked, _frame(block, stacked.frame)
    del owner


def _frame(block: Frames | NDArray[Any] | None, number: int) -> NDArray[Any] | None:
    if block is None or number >= len(block):
        return None
    try:
        return block[number]
    except (RuntimeError, *_WRONG) as error:
        if isinstance(error, RuntimeError):
            raise_if_memory_ran_out(error)
        return None  # compressed, and damaged


def _open_file(path: Path, is_multi_frame: bool) -> tuple[Frames | NDArray[Any] | None, sitk.Image | None]:
    frames = None
    if is_multi_frame:
        try:
            frames = open_frames(path)
        except _WRONG:
            frames = None  # whatever is wrong with it, GDCM may still read it
    return (frames, None) if frames is not None else _read_file(path)


def _read_file(path: Path) -> tuple[NDArray[Any] | None, sitk.Image | None]:
    """Return [frames, rows, cols] with rescale slope and intercept applied, or None; and the owner of that memory."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote paths: they must not reach a log
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise_if_memory_ran_out(error)
        return None, None
    pixels: NDArray[Any] = sitk.GetArrayViewFromImage(image)
    return (pixels if pixels.ndim == 3 else pixels[None]), image


def _volume(hu: NDArray[np.int16], stack: list[StackedSlice], notes: tuple[str, ...]) -> Volume:
    first = stack[0].plane
    rows, cols = np.asarray(first.along_rows), np.asarray(first.along_cols)
    normal = np.cross(rows, cols)
    places = np.array([float(np.dot(normal, np.subtract(item.plane.position_mm, first.position_mm))) for item in stack])
    steps = np.diff(places)
    step = float(np.median(steps)) if len(steps) else (first.thickness_mm or 1.0)
    uneven = len(steps) > 0 and bool(np.abs(steps - step).max() > max(_UNEVEN_FRACTION * step, 0.02))
    if uneven:
        missing = int(np.maximum(np.rint(steps / step) - 1, 0).sum())
        notes += (f"{missing} slices are missing" if missing else "slice distance is uneven",)
    geometry = Geometry(
        shape=(hu.shape[0], hu.shape[1], hu.shape[2]),
        spacing_mm=(step, *first.spacing_mm),
        origin_mm=first.position_mm,
        axes=np.array([normal, cols, rows]),
    )
    return Volume(hu, geometry, tuple(places.tolist()) if uneven else None, notes)
