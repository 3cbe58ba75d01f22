"""Which DICOM files make one volume: stacks of parallel slices, each sorted along its normal."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meddino.volumes.dicom.headers import DicomHeader, Plane

_SAME_PLACE_MM = 0.01
_SAME_SPACING_MM = 0.0005  # over 512 pixels a third of one
_SAME_COSINE = 0.005  # 0.3 degrees


@dataclass(frozen=True)
class StackedSlice:
    """One slice of a stack.

    Attributes:
        file: Index into the candidate's files.
        frame: Frame inside that file.
        plane: Where it lies.
    """

    file: int
    frame: int
    plane: Plane


@dataclass(frozen=True)
class DicomStack:
    """Parallel slices of one series, sorted along their normal.

    Attributes:
        files: Absolute paths.
        slices: In the order of their positions.
        rows: Pixels.
        cols: Pixels.
        notes: What was decided, in words of ours.
    """

    files: tuple[Path, ...]
    slices: tuple[StackedSlice, ...]
    rows: int
    cols: int
    notes: tuple[str, ...] = ()


def split_series(headers: Sequence[DicomHeader]) -> list[tuple[str, list[DicomHeader]]]:
    """Split the usable files of one series into volumes.

    Files belong together when they have the same size, nearly the same spacing and orientation, and are of the same pass.

    Args:
        headers: Without a refusal, in a fixed order.

    Returns:
        A name for each volume that depends on nothing but the files, and its files.
    """
    return [
        (f"{number}.{part}", passed)
        for number, stack in enumerate(_stacks(headers))
        for part, passed in enumerate(_passes(stack))
    ]


def make_stack(headers: Sequence[DicomHeader], notes: tuple[str, ...] = ()) -> DicomStack:
    """Sort the slices of one volume along their normal; what is decided comes after the notes that are given."""
    slices, doubled = _sorted_slices(headers)
    notes += (f"{doubled} duplicated slices left out",) if doubled else ()
    tilt = headers[0].tilt_deg
    if abs(tilt) > 0.5:
        notes += (f"gantry tilted by {tilt:.1f} degrees",)
    return DicomStack(tuple(header.path for header in headers), slices, headers[0].rows, headers[0].cols, notes)


def _stacks(headers: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
    """Return files of the same size and nearly the same spacing and orientation, in an order that depends on nothing else.

    Nearly: rounding would part two slices that lie on either side of its edge, however close they are.
    """
    stacks: list[list[DicomHeader]] = []
    by_shape: dict[tuple[object, ...], list[list[DicomHeader]]] = defaultdict(list)
    for header in headers:
        # A multi-frame file is a stack by itself.
        alike = by_shape[header.rows, header.cols, header.instance_uid if len(header.planes) > 1 else ""]
        stack = next((stack for stack in alike if _are_parallel(stack[0].planes[0], header.planes[0])), None)
        if stack is None:
            stack = []
            alike.append(stack)
            stacks.append(stack)
        stack.append(header)
    return sorted(stacks, key=lambda stack: (stack[0].rows, stack[0].cols, stack[0].planes[0].spacing_mm, stack[0].inside))


def _are_parallel(first: Plane, second: Plane) -> bool:
    said = (first.spacing_mm, first.along_rows, first.along_cols)
    if said == (second.spacing_mm, second.along_rows, second.along_cols):  # nearly always
        return True
    spacing = np.subtract(first.spacing_mm, second.spacing_mm)
    cosines = np.subtract((*first.along_rows, *first.along_cols), (*second.along_rows, *second.along_cols))
    return bool(np.abs(spacing).max() <= _SAME_SPACING_MM and np.abs(cosines).max() <= _SAME_COSINE)


def _passes(headers: list[DicomHeader]) -> list[list[DicomHeader]]:
    """Split several passes over the same places (phases, times); a single pass stays whole.

    Places that are taken twice are two passes only where acquisition or temporal position tells them apart without tearing up
    the rest: scanners that count an acquisition for each slice, and one slice sent twice, are still one pass.
    """
    unique: dict[str, DicomHeader] = {}
    for header in headers:
        unique.setdefault(header.instance_uid or header.inside, header)
    times, doubled = _times_taken(list(unique.values()))
    if not doubled:
        return [headers]
    best, fewest = [headers], doubled
    for names in (slice(0, 2), slice(0, 1), slice(1, 2)):
        passes = _by_pass(unique.values(), names)
        left = sum(_times_taken(passed)[1] for passed in passes)
        are_few = len(passes) <= times or (len(passes) <= 2 * times and 3 * doubled >= len(unique))
        if are_few and 2 * left < doubled and left < fewest:
            best, fewest = _by_pass(headers, names), left
    return best


def _by_pass(headers: Iterable[DicomHeader], names: slice) -> list[list[DicomHeader]]:
    passes: dict[tuple[int, ...], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        passes[tuple(header.pass_number)[names]].append(header)
    return [passes[key] for key in sorted(passes)]


def _times_taken(headers: Sequence[DicomHeader]) -> tuple[int, int]:
    """Return how often the place is taken that is taken most often, and how many slices lie where another one does."""
    reference = headers[0].planes[0]
    places = np.sort([_place(header.planes[0], reference) for header in headers])
    begins = np.flatnonzero(np.diff(places, prepend=-np.inf) > _SAME_PLACE_MM)
    times = np.diff(begins, append=len(places))
    return int(times.max()), len(places) - len(begins)


def _sorted_slices(headers: Sequence[DicomHeader]) -> tuple[tuple[StackedSlice, ...], int]:
    """Return the slices along their normal and how many were there twice."""
    reference = headers[0].planes[0]
    placed = [
        (_place(plane, reference), StackedSlice(index, frame, plane))
        for index, header in enumerate(headers)
        for frame, plane in enumerate(header.planes)
    ]
    placed.sort(key=lambda item: (round(item[0], 4), item[1].file, item[1].frame))
    kept: list[tuple[float, StackedSlice]] = []
    for place, stacked in placed:
        if not kept or place - kept[-1][0] > _SAME_PLACE_MM:
            kept.append((place, stacked))
    return tuple(stacked for _, stacked in kept), len(placed) - len(kept)


def _place(plane: Plane, reference: Plane) -> float:
    normal = np.cross(reference.along_rows, reference.along_cols)
    return float(np.dot(normal, plane.position_mm))
