"""Structures that people or programs drew on a series, DICOM-SEG and RTSTRUCT, as masks on the grid of an image."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.elements import NO_DICOM, silent_pydicom, text
from meddino.volumes.geometry import Geometry
from meddino.volumes.limits import ReadLimits

_SEGMENTATIONS = (SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")
"""Masks of segments, and label maps (Label Map Segmentation Storage, younger than some pydicom)."""
_LIMITS = ReadLimits()
_BESIDE = 0.1
"""Voxels by which a pixel of a DICOM-SEG, or a point of a contour across its slice, may lie beside a voxel's centre."""


@dataclass(frozen=True)
class Structures:
    """What was drawn, on the grid of an image.

    Attributes:
        masks: Of each name that was asked for and is there, [Z, Y, X].
        notes: What was left out or assumed.
    """

    masks: dict[str, NDArray[np.bool_]]
    notes: tuple[str, ...] = ()


def structure_names(path: Path) -> tuple[str, ...] | None:
    """Return the names of the structures in a DICOM-SEG or RTSTRUCT, in the file's order; None where it is neither.

    Raises:
        VolumeError: It is one and cannot be read, or names a structure twice.
    """
    if path.suffix.lower() not in ("", ".dcm", ".dicom") or not path.is_file():
        return None
    dataset = _opened(path, stop_before_pixels=True)
    if dataset is None:
        return None
    try:
        names = tuple(name for _, name in _numbered(dataset))
    except NO_DICOM as error:
        raise VolumeError(f"{path}: its structures cannot be read ({type(error).__name__})") from error
    keys = [name_key(name) for name in names]
    twice = sorted({name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1})
    if twice:
        raise VolumeError(f"{path}: two structures have the name {twice[0]!r}; rename one of them")
    return names


def name_key(name: str) -> str:
    """Return what is compared of a structure's name: people write one name with other capitals and blanks."""
    return " ".join(name.split()).casefold()


def read_structures(path: Path, grid: Geometry, names: Sequence[str]) -> Structures:
    """Put structures onto the grid of the image that they were drawn on.

    A voxel belongs to a contour if its centre lies inside (even-odd rule: contours within contours are holes).

    Args:
        path: A DICOM-SEG or RTSTRUCT.
        grid: Of the image.
        names: Which structures, compared by `name_key`; those that the file does not have are left out.

    Raises:
        VolumeError: It is damaged, or was drawn on another grid.
    """
    dataset = _opened(path)
    if dataset is None:
        raise VolumeError(f"{path} is neither DICOM-SEG nor RTSTRUCT")
    try:
        with silent_pydicom():
            by_key = {name_key(name): name for name in names}
            wanted = {number: by_key[name_key(name)] for number, name in _numbered(dataset) if name_key(name) in by_key}
            if dataset.SOPClassUID in _SEGMENTATIONS:
                return _from_segments(dataset, grid, wanted)
            return _from_contours(dataset, grid, wanted)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    except NO_DICOM as error:
        raise VolumeError(f"{path}: its structures cannot be read ({type(error).__name__})") from error


def fill_polygon(points: Float[np.ndarray, "points 2"], shape: tuple[int, int]) -> Bool[np.ndarray, "rows cols"]:
    """Return the pixels whose centres lie inside a closed polygon, by the even-odd rule.

    A centre on an edge belongs to the polygon on its right or below: two polygons with a common edge share no pixel.

    Args:
        points: (row, column) of the corners, in pixels; the centre of the first pixel is (0, 0).
        shape: Rows and columns.
    """
    (row_0, col_0), (row_1, col_1) = points.T, np.roll(points, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(row_0, row_1)), 0, shape[0]).astype(np.int64)
    stop = np.clip(np.ceil(np.maximum(row_0, row_1)), 0, shape[0]).astype(np.int64)
    counts = stop - first
    edge = np.repeat(np.arange(len(points)), counts)  # one entry for each row of centres that an edge crosses
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    share = (row - row_0[edge]) / (row_1 - row_0)[edge]
    crossing = np.clip(np.ceil(col_0[edge] + share * (col_1 - col_0)[edge]), 0, shape[1]).astype(np.int64)
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    np.add.at(crossings, (row, crossing), 1)
    inside: NDArray[np.bool_] = np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
    return inside


def _opened(path: Path, **options: Any) -> Any:
    """Return the dataset of a file with structures, None of another."""
    try:
        with silent_pydicom():
            dataset = pydicom.dcmread(path, **options)
    except NO_DICOM:
        return None
    return dataset if dataset.get("SOPClassUID") in (*_SEGMENTATIONS, RTStructureSetStorage) else None


def _numbered(dataset: Any) -> Iterator[tuple[int, str]]:
    if dataset.SOPClassUID in _SEGMENTATIONS:
        for item in dataset.SegmentSequence:
            yield int(item.SegmentNumber), text(item, "SegmentLabel").strip()
        return
    items = dataset.get("ROIContourSequence", [])
    drawn = {int(item.ReferencedROINumber) for item in items if next(_closed(item), None) is not None}
    for item in dataset.StructureSetROISequence:
        if int(item.ROINumber) in drawn:  # a marked point is no structure
            yield int(item.ROINumber), text(item, "ROIName").strip()


def _closed(item: Any) -> Iterator[Any]:
    yield from (one for one in item.get("ContourSequence", []) if one.get("ContourGeometricType", "") == "CLOSED_PLANAR")


def _to_voxels(grid: Geometry, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return array indices [n, 3] (z, y, x) of patient positions [n, 3] (LPS, x y z)."""
    steps = np.asarray(grid.spacing_mm)[:, None] * grid.axes
    found: NDArray[np.float64] = (points_mm - np.asarray(grid.origin_mm)) @ np.linalg.inv(steps)
    return found


def _from_segments(dataset: Any, grid: Geometry, wanted: dict[int, str]) -> Structures:
    rows, cols = int(dataset.Rows), int(dataset.Columns)
    _LIMITS.check((int(dataset.get("NumberOfFrames", 1)), rows, cols))
    pixels = dataset.pixel_array.reshape(-1, rows, cols)
    masks = {name: np.zeros(grid.shape, dtype=np.bool_) for name in wanted.values()}
    shared, outside = dataset.SharedFunctionalGroupsSequence[0], 0
    kind, half = text(dataset, "SegmentationType"), 0.5 * float(dataset.get("MaximumFractionalValue", 1))
    for values, own in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        numbers = [*wanted] if kind == "LABELMAP" else [int(own.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
        start, down, right = _frame_steps(own, shared, grid, rows, cols)
        for number in [one for one in numbers if one in wanted]:
            own_pixels = (
                values == number if kind == "LABELMAP" else values >= max(half, 1) if kind == "FRACTIONAL" else values > 0
            )
            row, col = np.nonzero(own_pixels)
            places = start + row[:, None] * down + col[:, None] * right
            inside = ((places >= 0) & (places < grid.shape)).all(axis=1)
            outside += int((~inside).sum())
            masks[wanted[number]][tuple(places[inside].T)] = True
    return Structures(masks, (f"{outside} voxels of its segments lie outside of the image",) if outside else ())


def _frame_steps(own: Any, shared: Any, grid: Geometry, rows: int, cols: int) -> tuple[NDArray[np.int64], ...]:
    """Return a frame's first voxel and the steps to the next row and column; a frame on other voxels is refused."""

    def group(name: str) -> Any:
        return (own if name in own else shared)[name][0]

    position = np.array(group("PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    cosines = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    down_mm, right_mm = np.array(group("PixelMeasuresSequence").PixelSpacing, dtype=np.float64)
    ends = [position, position + max(rows - 1, 1) * down_mm * cosines[3:], position + max(cols - 1, 1) * right_mm * cosines[:3]]
    voxels = _to_voxels(grid, np.stack(ends))
    whole = np.rint(voxels).astype(np.int64)
    down, right = whole[1] - whole[0], whole[2] - whole[0]
    on_lines = sorted(np.abs(down).tolist()) == [0, 0, max(rows - 1, 1)] and sorted(np.abs(right).tolist()) == [
        0,
        0,
        max(cols - 1, 1),
    ]
    if np.abs(voxels - whole).max() > _BESIDE or not on_lines:
        raise VolumeError(
            f"its {rows} x {cols} pixels of {down_mm:g} x {right_mm:g} mm are no voxels of the image ({list(grid.shape)} of "
            f"{np.round(grid.spacing_mm, 4).tolist()} mm): it was made on another series, or one of them was resampled"
        )
    return whole[0], np.sign(down), np.sign(right)


def _from_contours(dataset: Any, grid: Geometry, wanted: dict[int, str]) -> Structures:
    masks, notes = {}, []
    for item in dataset.get("ROIContourSequence", []):
        name = wanted.get(int(item.ReferencedROINumber))
        if name is None:
            continue
        contours = [_to_voxels(grid, np.array(one.ContourData, dtype=np.float64).reshape(-1, 3)) for one in _closed(item)]
        others = len(item.ContourSequence) - len(contours)
        notes += [f"{others} contours of '{name}' that are not closed are left out"] if others else []
        masks[name], found = _filled(contours, grid, name)
        notes += found
    return Structures(masks, tuple(notes))


def _filled(contours: Sequence[NDArray[np.float64]], grid: Geometry, name: str) -> tuple[NDArray[np.bool_], list[str]]:
    spans = np.max([np.ptp(one, axis=0) for one in contours], axis=0)
    axis = int(np.argmin(spans))
    places = np.array([one[:, axis].mean() for one in contours])
    if spans[axis] > _BESIDE or np.abs(places - np.rint(places)).max() > _BESIDE:
        raise VolumeError(
            f"contours of '{name}' do not lie in the image's slices (of {grid.spacing_mm[axis]:g} mm): they were drawn on "
            "another series, or the image was resampled"
        )
    mask = np.zeros(grid.shape, dtype=np.bool_)
    by_slice: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for place, contour in zip(np.rint(places).astype(int).tolist(), contours, strict=True):
        by_slice[place].append(np.delete(contour, axis, axis=1))
    planes = np.moveaxis(mask, axis, 0)
    for place in [one for one in by_slice if 0 <= one < len(planes)]:
        for contour in by_slice[place]:
            planes[place] ^= fill_polygon(contour, (planes.shape[1], planes.shape[2]))
    beyond = [one for one in by_slice if not 0 <= one < len(planes)]
    skipped = max(by_slice) - min(by_slice) + 1 - len(by_slice)
    notes = [f"contours of '{name}' on {len(beyond)} slices lie outside of the image"] if beyond else []
    return mask, notes + ([f"contours of '{name}' skip {skipped} slices between others, which stay empty"] if skipped else [])
