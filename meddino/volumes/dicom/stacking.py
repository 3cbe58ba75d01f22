"""Which slices of a series make one volume: parallel, one at each place, told apart by headers where there are several."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from meddino.volumes.dicom.frames import TELLING_NAMES, Frame, Plane
from meddino.volumes.dicom.headers import DicomHeader
from meddino.volumes.dicom.stored_values import open_frames

_SAME_PLACE_MM = 0.01
_SAME_PLACE_STEPS = 0.05
_SAME_SPACING_MM = 0.0005  # over 512 pixels a third of one
_SAME_COSINE = 0.005  # 0.3 degrees
_MOST_CONTESTED = 0.02  # share of places whose slices contradict each other and may be left out
_PEEKED_PLACES = 6


@dataclass(frozen=True)
class StackedSlice:
    """One slice of a stack.

    Attributes:
        file: Index into the stack's files.
        frame: What the header says of it.
    """

    file: int
    frame: Frame

    @property
    def plane(self) -> Plane:
        """Where it lies."""
        return self.frame.plane


@dataclass(frozen=True)
class DicomStack:
    """Parallel slices of one series, sorted along their normal.

    Attributes:
        files: Absolute paths.
        slices: In the order of their positions.
        rows: Pixels.
        cols: Pixels.
        modality: "CT" or "MR".
        photometric: PhotometricInterpretation of the first file.
        notes: What was decided, in words of ours.
        problem: Why its slices make no volume, or "".
    """

    files: tuple[Path, ...]
    slices: tuple[StackedSlice, ...]
    rows: int
    cols: int
    modality: str = "CT"
    photometric: str = ""
    notes: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """One volume of a series.

    Attributes:
        name: Depends on nothing but the series' files.
        headers: Its files.
        stack: Its slices.
    """

    name: str
    headers: tuple[DicomHeader, ...]
    stack: DicomStack


@dataclass(frozen=True)
class _Picture:
    """One frame of one file; its SOPInstanceUID says nothing where pictures at other places have it too."""

    header: DicomHeader
    frame: Frame
    is_uid_shared: bool = False

    @property
    def identity(self) -> tuple[str, int]:
        uid = "" if self.is_uid_shared else self.header.instance_uid
        return uid or self.header.inside, self.frame.number


@dataclass(frozen=True)
class _Pass:
    """Pictures with one at each place, how many came twice, and why they are none."""

    pictures: list[_Picture]
    doubled: int = 0
    notes: tuple[str, ...] = ()
    problem: str = ""


def split_series(headers: Sequence[DicomHeader], notes: tuple[str, ...] = ()) -> list[Part]:
    """Split the usable files of one series into volumes.

    Slices belong together when they have the same size, nearly the same spacing and orientation, and lie at different places.
    Several at one place are one where they are the same picture; else they are parted by what their headers say.

    Args:
        headers: Without a refusal, in a fixed order.
        notes: Of the series.

    Raises:
        OSError: Pixels that had to be compared cannot be read.
    """
    stacks = _parallel([_Picture(header, frame) for header in headers for frame in header.frames])
    shared = _shared_identities(stacks)
    if shared:
        notes += ("SOPInstanceUIDs are not unique: pictures at different places have the same",)
        stacks = [[replace(item, is_uid_shared=item.identity in shared) for item in stack] for stack in stacks]
    passes = [
        (f"{number}.{part}", found) for number, parallel in enumerate(stacks) for part, found in enumerate(_passes(parallel))
    ]
    if len(passes) > 1:
        notes += (f"its series holds {len(passes)} volumes",)
    return [_part(name, found, notes) for name, found in passes]


def _part(name: str, found: _Pass, notes: tuple[str, ...]) -> Part:
    headers = list({id(picture.header): picture.header for picture in found.pictures}.values())
    number = {id(header): index for index, header in enumerate(headers)}
    reference = found.pictures[0].frame.plane
    ordered = sorted(found.pictures, key=lambda item: (round(item.frame.plane.along_normal_mm(reference), 4), item.identity))
    slices = tuple(StackedSlice(number[id(item.header)], item.frame) for item in ordered)
    notes += (f"{found.doubled} duplicated slices left out",) if found.doubled else ()
    notes += found.notes
    first = headers[0]
    if any(picture.frame.is_placed_by_spacing for picture in found.pictures):
        notes += ("only the first frame's place is in the file: frames follow each other along the normal",)
    if any(picture.frame.is_half_scaled for picture in found.pictures):
        notes += ("only one of rescale slope and intercept is in the file: the other is taken as 1 or 0",)
    if any(picture.frame.plane.is_normalised for picture in found.pictures):
        notes += ("directions of rows and columns are not of length 1 in the file: taken as if they were",)
    if abs(first.tilt_deg) > 0.5:
        notes += (f"gantry tilted by {first.tilt_deg:.1f} degrees",)
    stack = DicomStack(
        tuple(header.path for header in headers), slices, first.rows, first.cols, first.modality, first.photometric, notes,
        found.problem,
    )  # fmt: skip
    return Part(name, tuple(headers), stack)


def _parallel(pictures: Sequence[_Picture]) -> list[list[_Picture]]:
    """Return pictures of the same size and nearly the same spacing and orientation, in an order that depends on nothing else.

    Nearly: rounding would part two slices that lie on either side of its edge, however close they are.
    """
    stacks: list[list[_Picture]] = []
    by_shape: dict[tuple[object, ...], list[list[_Picture]]] = defaultdict(list)
    for picture in pictures:
        header = picture.header
        # A multi-frame file is a series by itself, with its copies: of the same UID and from the same place to the same.
        ends = (header.frames[0].plane, header.frames[-1].plane) if len(header.frames) > 1 else ()
        file = (header.instance_uid, *(round(value, 1) for plane in ends for value in plane.position_mm)) if ends else ()
        alike = by_shape[header.rows, header.cols, file]
        stack = next((stack for stack in alike if _are_parallel(stack[0].frame.plane, picture.frame.plane)), None)
        if stack is None:
            stack = []
            alike.append(stack)
            stacks.append(stack)
        stack.append(picture)

    def order(stack: list[_Picture]) -> tuple[object, ...]:
        first = stack[0]
        return first.header.rows, first.header.cols, first.frame.plane.spacing_mm, first.header.inside, first.frame.number

    return sorted(stacks, key=order)


def _shared_identities(stacks: Sequence[list[_Picture]]) -> set[tuple[str, int]]:
    """Return the identities that pictures at different places have: nothing follows from them."""
    copies = Counter(picture.identity for stack in stacks for picture in stack)
    if len(copies) == sum(copies.values()):  # nearly always
        return set()
    places: Counter[tuple[str, int]] = Counter()
    for stack in stacks:
        for place in _places(stack):
            places.update({picture.identity for picture in place})
    return {identity for identity, count in places.items() if count > 1}


def _are_parallel(first: Plane, second: Plane) -> bool:
    said = (first.spacing_mm, first.along_rows, first.along_cols)
    if said == (second.spacing_mm, second.along_rows, second.along_cols):  # nearly always
        return True
    spacing = np.subtract(first.spacing_mm, second.spacing_mm)
    cosines = np.subtract((*first.along_rows, *first.along_cols), (*second.along_rows, *second.along_cols))
    return bool(np.abs(spacing).max() <= _SAME_SPACING_MM and np.abs(cosines).max() <= _SAME_COSINE)


def _passes(pictures: list[_Picture]) -> list[_Pass]:
    """Part pictures so that each place is taken once: by identity, by pixels, by what headers say, or not at all.

    Never by path: of two different pictures at one place neither is right by itself.
    """
    first: dict[tuple[str, int], _Picture] = {}
    for picture in pictures:
        first.setdefault(picture.identity, picture)
    copies = Counter(picture.identity for picture in pictures)
    unique = list(first.values())
    places = _places(unique)
    if len(places) == 1 and len(unique) > 2:
        return [_Pass(unique, problem=f"DICOM: all {len(unique)} slices of the series lie at one position")]
    if len(places) < len(unique) and _may_hold_copies(places):
        unique = []
        for place in places:
            for same in _same_content(place):
                unique.append(same[0])
                copies[same[0].identity] = sum(copies[picture.identity] for picture in same)
        places = _places(unique)

    def one(part: list[_Picture], notes: tuple[str, ...] = (), problem: str = "") -> _Pass:
        return _Pass(part, sum(copies[picture.identity] - 1 for picture in part), notes, problem)

    if len(places) == len(unique):
        return [one(unique)]
    parts = _told_apart(unique, places) or _in_turn(places)
    if parts is not None:
        return [one(part) for part in parts]
    contested = sum(len(place) > 1 for place in places)
    if contested > _MOST_CONTESTED * len(places):
        problem = f"DICOM: different slices lie at {contested} of {len(places)} positions and no header tells them apart"
        return [one(unique, problem=problem)]
    note = f"{contested} positions with contradicting slices left out"
    return [one([place[0] for place in places if len(place) == 1], (note,))]


def _places(pictures: Iterable[_Picture]) -> list[list[_Picture]]:
    """Return the pictures by place, along the normal; the order inside a place is that of the pictures.

    What differs by a fraction of the usual step lies at one place. Copies, whose positions may be rounded, make no step.
    """
    listed = list(pictures)
    reference = listed[0].frame.plane
    along = np.array([picture.frame.plane.along_normal_mm(reference) for picture in listed])
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    is_apart = steps > _SAME_PLACE_MM
    is_copy = np.array([listed[low].identity == listed[high].identity for low, high in pairwise(order.tolist())], dtype=bool)
    apart = steps[is_apart & ~is_copy] if (is_apart & ~is_copy).any() else steps[is_apart]
    tolerance = max(_SAME_PLACE_MM, _SAME_PLACE_STEPS * float(np.median(apart))) if len(apart) else _SAME_PLACE_MM
    ends = np.flatnonzero(np.concatenate([steps > tolerance, [True]])) + 1
    groups = np.split(order, ends[:-1])
    return [[listed[index] for index in sorted(group.tolist())] for group in groups]


def _may_hold_copies(places: Sequence[list[_Picture]]) -> bool:
    """Tell whether pixels have to be compared: not where the first places that are taken twice all differ."""
    contested = [place for place in places if len(place) > 1]
    if len(contested) <= _PEEKED_PLACES:
        return True
    peeked = contested[:: len(contested) // _PEEKED_PLACES]
    return any(len(_same_content(place)) < len(place) for place in peeked)


def _same_content(place: Sequence[_Picture]) -> list[list[_Picture]]:
    """Return the pictures of one place, together where pixels and rescale are the same."""
    if len(place) == 1:
        return [list(place)]
    found: dict[object, list[_Picture]] = defaultdict(list)
    for picture in place:
        frames = open_frames(picture.header.path)
        stored = frames[picture.frame.number] if frames is not None else None
        content = None if stored is None else (stored.dtype.kind, stored.tobytes(), picture.frame.scale)
        found[picture.identity if content is None else content].append(picture)
    return list(found.values())


def _told_apart(pictures: Sequence[_Picture], places: Sequence[list[_Picture]]) -> list[list[_Picture]] | None:
    """Return the parts into which the headers split the pictures with nothing left at one place, or None.

    A fact that splits into many parts explains nothing: scanners count an acquisition for each slice.
    """
    times, doubled = max(map(len, places)), len(pictures) - len(places)
    facts = {"acquisition and time": (0, 1), **{name: (index,) for index, name in enumerate(TELLING_NAMES)}}
    for chosen in [*facts.values(), *combinations(range(len(TELLING_NAMES)), 2)]:
        parts: dict[tuple[str, ...], list[_Picture]] = defaultdict(list)
        for picture in pictures:
            parts[tuple(_fact(picture, index) for index in chosen)].append(picture)
        few = len(parts) <= times or (len(parts) <= 2 * times and 3 * doubled >= len(pictures))
        if few and len(parts) > 1 and all(len(_places(part)) == len(part) for part in parts.values()):
            return [parts[key] for key in sorted(parts)]
    return None


def _fact(picture: _Picture, index: int) -> str:
    return picture.frame.telling[index]


def _in_turn(places: Sequence[list[_Picture]]) -> list[list[_Picture]] | None:
    """Return the parts where each place is taken equally often and one pass ends, by number or time, before the next begins."""
    times = len(places[0])
    if any(len(place) != times for place in places):
        return None
    time = TELLING_NAMES.index("AcquisitionTime")
    keys: tuple[Callable[[_Picture], object], ...] = (
        lambda picture: picture.header.number,
        lambda picture: _fact(picture, time),
        lambda picture: _fact(picture, time + 1),
    )
    for key in keys:
        ranked = [sorted(place, key=key) for place in places]  # type: ignore[arg-type]
        parts = [[place[rank] for place in ranked] for rank in range(times)]
        spans = [(min(map(key, part)), max(map(key, part))) for part in parts]  # type: ignore[type-var]
        if all(spans[rank][1] < spans[rank + 1][0] for rank in range(times - 1)):  # type: ignore[operator]
            return parts
    return None
