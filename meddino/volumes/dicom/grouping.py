"""Which DICOM files are of one series of one patient: by what their headers share, where a literal id fails too."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from meddino.volumes.dicom.frames import TELLING_NAMES
from meddino.volumes.dicom.headers import DicomHeader
from meddino.volumes.dicom.patients import is_nobody

_LEAST_TORN = 3  # one-slice series that may be one scan
_EVEN_FRACTION = 0.05


@dataclass(frozen=True)
class DicomSeries:
    """Files of one series of one patient.

    Attributes:
        uid: Of the series; words of ours where its files have none of their own.
        patient: `DicomHeader.patient` of the first file.
        headers: Sorted by path.
        notes: How it was put together, where that was not plain.
    """

    uid: str
    patient: str
    headers: tuple[DicomHeader, ...]
    notes: tuple[str, ...] = ()


def group_series(headers: Iterable[DicomHeader]) -> list[DicomSeries]:
    """Put files together that name the same series and are of the same patient, and what an anonymiser has torn apart.

    Returns:
        In an order that depends on nothing but the headers.
    """
    by_uid: dict[str, list[DicomHeader]] = defaultdict(list)
    for header in sorted(headers, key=lambda header: header.inside):
        by_uid[header.series_uid or f"no series UID: {header.inside}"].append(header)
    series = []
    for uid, members in by_uid.items():
        people = _people(members)
        notes = ("series UID is shared with another patient",) if len(people) > 1 else ()
        series += [DicomSeries(uid, person[0].patient, tuple(person), notes) for person in people]
    return sorted(_without_torn(series), key=lambda item: (item.uid, item.patient))


def _people(headers: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
    """Split files by patient: an id outweighs how a name is written, a name counts where there is no id."""
    by_key: dict[tuple[str, str, str], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        name, birth = header.person
        written = header.patient_id.strip().casefold()
        by_key[("id", written, "") if not is_nobody(written) else (name, written, birth)].append(header)
    return list(by_key.values())


def _without_torn(series: Sequence[DicomSeries]) -> list[DicomSeries]:
    """Put series of one slice each together where they are the evenly spaced slices of one scan."""
    single: dict[tuple[object, ...], list[DicomSeries]] = defaultdict(list)
    whole = []
    for item in series:
        (first, *others) = item.headers
        if others or len(first.frames) != 1:
            whole.append(item)
        else:
            single[_scan(first)].append(item)
    for key, parts in single.items():
        headers = tuple(header for part in sorted(parts, key=lambda part: part.headers[0].inside) for header in part.headers)
        if len(parts) >= _LEAST_TORN and _is_evenly_spaced(headers):
            unnamed = all(not header.series_uid for header in headers)
            why = "files name no series" if unnamed else f"{len(headers)} series of one slice each"
            note = f"{why}: put together by study, orientation and place"
            uid = f"torn: {' '.join(map(str, key[:4]))}"
            whole.append(DicomSeries(uid, headers[0].patient, headers, (note,)))
        else:
            whole += parts
    return whole


def _scan(header: DicomHeader) -> tuple[object, ...]:
    """Return what the slices of one scan share."""
    (frame,) = header.frames
    plane = frame.plane
    identity = header.patient_id.strip().casefold() if not is_nobody(header.patient_id) else header.person
    study = header.study_uid or str(PurePosixPath(header.inside).parent)
    along = (*plane.along_rows, *plane.along_cols, *plane.spacing_mm, plane.thickness_mm)
    kernel_and_kind = tuple(frame.telling[TELLING_NAMES.index(name)] for name in ("KVP", "ConvolutionKernel", "ImageType"))
    numbers = tuple(round(value, 2) for value in along)
    return (study, header.frame_of_reference, str(identity), kernel_and_kind, header.rows, header.cols, numbers, header.refusal)


def _is_evenly_spaced(headers: Sequence[DicomHeader]) -> bool:
    planes = [header.frames[0].plane for header in headers]
    steps = np.diff(np.sort([plane.along_normal_mm(planes[0]) for plane in planes]))
    step = float(np.median(steps))
    if step <= 0:
        return False
    return bool(np.mean(np.abs(steps / step - np.rint(steps / step)) <= _EVEN_FRACTION) > 0.9 and (steps > 0.5 * step).all())
