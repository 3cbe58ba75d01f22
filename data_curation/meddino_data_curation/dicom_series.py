"""DICOM files put together to volumes: one candidate for each stack of parallel slices of one patient's series."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meddino_data_curation.candidates import Candidate, patient_key
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.dicom_headers import DicomHeader, Plane
from meddino_data_curation.privacy import Salt

_SAME_PLACE_MM = 0.01


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

    Files belong together when they name the same series AND the same patient, have the same size, spacing and orientation,
    and are of the same pass. Files that are no CT slices make one refused candidate a series and reason.
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
        stacks: dict[tuple[object, ...], list[DicomHeader]] = defaultdict(list)
        for header in members:
            if header.refusal:
                refused[header.refusal].append(header)
            else:
                stacks[_stack_key(header)].append(header)
        made = [self._refused(reason, headers) for reason, headers in sorted(refused.items())]
        for number, key in enumerate(sorted(stacks, key=repr)):
            for part, passed in enumerate(_passes(stacks[key])):
                made.append(self._stack(passed, f"{number}.{part}"))
        return made

    def _base(self, headers: Sequence[DicomHeader], part: str) -> dict[str, object]:
        first = headers[0]
        patient = first.patient_id or self.patient
        stamps = hashlib.sha256("\n".join(header.stamp for header in headers).encode("utf-8", "surrogateescape")).hexdigest()
        return {
            "volume_id": self.salt.key("volume", self.source.name, self.uid, self.patient, part),
            "source": self.source_number,
            "format": "dicom",
            "files": tuple(header.path for header in headers),
            "place": f"series {self.uid} ({part}), {len(headers)} files, first: {first.inside}",
            "patient_key": patient_key(self.salt, self.source.name, patient, bool(first.patient_id)),
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


def _stack_key(header: DicomHeader) -> tuple[object, ...]:
    plane = header.planes[0]
    return (
        header.rows,
        header.cols,
        tuple(round(value, 4) for value in plane.spacing_mm),
        tuple(round(value, 2) + 0.0 for value in (*plane.along_rows, *plane.along_cols)),
        header.instance_uid if len(header.planes) > 1 else "",  # a multi-frame file is a stack by itself
    )


def _passes(headers: list[DicomHeader]) -> list[list[DicomHeader]]:
    """Split several passes over the same places (phases, times); a single pass stays whole."""
    unique: dict[str, DicomHeader] = {}
    for header in headers:
        unique.setdefault(header.instance_uid or header.inside, header)
    places = [_place(header.planes[0], header.planes[0]) for header in unique.values()]
    if len({round(place / _SAME_PLACE_MM) for place in places}) == len(places):
        return [headers]
    passes: dict[tuple[int, int], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        passes[header.pass_number].append(header)
    return [passes[key] for key in sorted(passes)]


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
