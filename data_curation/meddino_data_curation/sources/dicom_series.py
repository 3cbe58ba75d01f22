"""DICOM files put together to volumes: one candidate for each stack of parallel slices of one patient's series."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meddino_data_curation.config import SourceConfig
from meddino_data_curation.dicom_headers import DicomHeader, Plane
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.patient_ids import is_nobody, named_in_path, patient_id

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
class DicomCandidate(Candidate):
    """A stack of parallel slices, sorted along their normal.

    Attributes:
        stack: The slices in that order.
        rows: Pixels.
        cols: Pixels.
    """

    stack: tuple[StackedSlice, ...] = ()
    rows: int = 0
    cols: int = 0


def group_series(headers: Iterable[DicomHeader], source_number: int, source: SourceConfig, salt: Salt) -> list[DicomCandidate]:
    """Group files into volumes.

    Files belong together when they name the same series AND the same patient, have the same size, nearly the same spacing and
    orientation, and are of the same pass. Files that are no CT slices make one refused candidate a series and reason.
    """
    series: dict[tuple[str, str], list[DicomHeader]] = defaultdict(list)
    patients: dict[str, set[str]] = defaultdict(set)
    for header in headers:
        uid = header.series_uid or f"no series UID: {header.inside}"
        series[uid, header.patient].append(header)
        patients[uid].add(header.patient)
    candidates = []
    for (uid, patient), members in sorted(series.items(), key=lambda item: item[0]):
        notes = ("series UID is shared with another patient",) if len(patients[uid]) > 1 else ()
        members.sort(key=lambda header: header.inside)
        maker = _SeriesMaker(source_number, source, salt, uid, patient, notes)
        candidates += maker.candidates(members)
    return candidates


class _SeriesMaker:
    def __init__(
        self, source_number: int, source: SourceConfig, salt: Salt, uid: str, patient: str, notes: tuple[str, ...]
    ) -> None:
        self.source_number, self.source, self.salt = source_number, source, salt
        self.uid, self.patient, self.notes = uid, patient, notes

    def candidates(self, members: list[DicomHeader]) -> list[DicomCandidate]:
        refused: dict[str, list[DicomHeader]] = defaultdict(list)
        usable: list[DicomHeader] = []
        for header in members:
            if header.refusal:
                refused[header.refusal].append(header)
            else:
                usable.append(header)
        made = [self._refused(reason, headers) for reason, headers in sorted(refused.items())]
        parts = [
            (f"{number}.{part}", passed)
            for number, stack in enumerate(_stacks(usable))
            for part, passed in enumerate(_passes(stack))
        ]
        if len(parts) > 1:
            self.notes += (f"its series holds {len(parts)} volumes",)
        return made + [self._stack(passed, part) for part, passed in parts]

    def _base(self, headers: Sequence[DicomHeader], part: str) -> dict[str, object]:
        first = headers[0]
        stand_in = f"{self.patient} {first.study_uid or self.uid}"
        # A path tells only where the header does not: folders of one patient may have been sorted by anything.
        named = named_in_path(self.source.patient_pattern, first.inside) if is_nobody(first.patient_id) else ""
        written = named or first.patient_id
        who = patient_id(self.salt, self.source.name, written, "pattern" if named else "header", stand_in)
        stamps = hashlib.sha256("\n".join(header.stamp for header in headers).encode("utf-8", "surrogateescape")).hexdigest()
        return {
            "volume_id": self.salt.key("volume", self.source.name, self.uid, self.patient, part),
            "source": self.source_number,
            "format": "dicom",
            "files": tuple(header.path for header in headers),
            "place": f"series {self.uid} ({part}), {len(headers)} files, first: {first.inside}",
            "patient_key": who.key,
            "patient": written,
            "patient_is_known": who.is_known,
            "series_key": self.salt.key("series", self.uid),
            "study_key": self.salt.key("study", first.study_uid) if first.study_uid else None,
            "stamp": stamps,
        }

    def _refused(self, reason: str, headers: list[DicomHeader]) -> DicomCandidate:
        base = self._base(headers, f"refused: {reason}")
        return DicomCandidate(**base, problem=reason, notes=self.notes)  # type: ignore[arg-type]

    def _stack(self, headers: list[DicomHeader], part: str) -> DicomCandidate:
        slices, doubled = _sorted_slices(headers)
        notes = self.notes + ((f"{doubled} duplicated slices left out",) if doubled else ())
        tilt = headers[0].tilt_deg
        if abs(tilt) > 0.5:
            notes += (f"gantry tilted by {tilt:.1f} degrees",)
        base = self._base(headers, part)
        return DicomCandidate(**base, notes=notes, stack=slices, rows=headers[0].rows, cols=headers[0].cols)  # type: ignore[arg-type]


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
