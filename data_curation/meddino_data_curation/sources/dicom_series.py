"""DICOM files put together to volumes: one candidate for each stack of parallel slices of one patient's series."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meddino.volumes.dicom.grouping import DicomStack, make_stack, split_series
from meddino.volumes.dicom.headers import DicomHeader
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.patient_ids import is_nobody, named_in_path, patient_id


@dataclass(frozen=True)
class DicomCandidate(Candidate):
    """A stack of parallel slices; None where the files are refused."""

    stack: DicomStack | None = None


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
        parts = split_series(usable)
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
        stack = make_stack(headers, self.notes)
        base = self._base(headers, part)
        return DicomCandidate(**base, notes=stack.notes, stack=stack)  # type: ignore[arg-type]
