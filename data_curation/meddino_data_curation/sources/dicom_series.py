"""DICOM files as candidates: one for each volume of a series, and one for each reason for which files of it are refused."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meddino.data.intensity import MEMBERS
from meddino.volumes.dicom.grouping import DicomSeries, group_series
from meddino.volumes.dicom.headers import DicomHeader
from meddino.volumes.dicom.patients import is_nobody
from meddino.volumes.dicom.stacking import DicomStack, split_series
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.patient_ids import named_in_path, patient_id


@dataclass(frozen=True)
class DicomCandidate(Candidate):
    """A stack of parallel slices; None where the files are refused, or one picture."""

    stack: DicomStack | None = None


def dicom_candidates(
    headers: Iterable[DicomHeader], source_number: int, source: SourceConfig, salt: Salt
) -> list[DicomCandidate]:
    """Group files into volumes. Files that are no slices of one make one refused candidate a series and reason."""
    return [
        candidate
        for series in group_series(headers)
        for candidate in _SeriesMaker(source_number, source, salt, series).candidates()
    ]


class _SeriesMaker:
    def __init__(self, source_number: int, source: SourceConfig, salt: Salt, series: DicomSeries) -> None:
        self.source_number, self.source, self.salt, self.series = source_number, source, salt, series
        # Pictures have many codes: what the header says is asked for.
        self.code = "" if source.takes_pictures or source.modality == "auto" else MEMBERS[source.modality].dicom_codes[0]

    def candidates(self) -> list[DicomCandidate]:
        refused: dict[str, list[DicomHeader]] = defaultdict(list)
        usable: dict[str, list[DicomHeader]] = defaultdict(list)
        pictures = []
        uids = Counter(header.instance_uid for header in self.series.headers)
        for header in self.series.headers:
            if header.picture is not None and self.source.takes_pictures:
                # A UID that several files have tells them apart no more; copies among them are found by their pixels.
                own = header.instance_uid if uids[header.instance_uid] == 1 else f"{header.instance_uid} {header.inside}"
                base = {**self._base([header], f"picture {own}"), "format": "picture"}
                pictures.append(DicomCandidate(**base, problem=header.picture))  # type: ignore[arg-type]
                continue
            wanted = self.code or header.modality or "CT"
            (refused[why] if (why := header.why_not(wanted)) else usable[header.modality]).append(header)
        made = [
            DicomCandidate(**self._base(files, f"refused: {reason}"), problem=reason, notes=self.series.notes)  # type: ignore[arg-type]
            for reason, files in sorted(refused.items())
        ]
        for part in (part for _, files in sorted(usable.items()) for part in split_series(files, self.series.notes)):
            stack = part.stack
            base = self._base(part.headers, part.name)
            made.append(DicomCandidate(**base, notes=stack.notes, problem=stack.problem, stack=stack))  # type: ignore[arg-type]
        return [*pictures, *made]

    def _base(self, headers: Sequence[DicomHeader], part: str) -> dict[str, object]:
        first, uid, patient = headers[0], self.series.uid, self.series.patient
        # A path tells only where the header does not: folders of one patient may have been sorted by anything.
        named = named_in_path(self.source.patient_pattern, first.inside) if is_nobody(first.patient_id) else ""
        written = named or first.patient_id
        stand_in = f"{patient} {first.study_uid or uid}"
        who = patient_id(self.salt, self.source.name, written, "pattern" if named else "header", stand_in)
        modified = hashlib.sha256(
            "\n".join(header.modified for header in headers).encode("utf-8", "surrogateescape")
        ).hexdigest()
        return {
            "volume_id": self.salt.key("volume", self.source.name, uid, patient, part),
            "source": self.source_number,
            "format": "dicom",
            "files": tuple(header.path for header in headers),
            "source_path": f"series {uid} ({part}), {len(headers)} files, first: {first.inside}",
            "patient_key": who.key,
            "patient": written,
            "patient_is_known": who.is_known,
            "patient_is_named": who.is_named,
            "series_key": self.salt.key("series", uid),
            "study_key": self.salt.key("study", first.study_uid) if first.study_uid else None,
            "modified": modified,
        }
