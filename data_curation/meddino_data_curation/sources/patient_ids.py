"""Which volumes are of one patient: what an id says, where it counts, and its salted hash."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from meddino.volumes.dicom.patients import is_nobody
from meddino_data_curation.privacy import Salt

if TYPE_CHECKING:
    from meddino_data_curation.config import SourceConfig
    from meddino_data_curation.sources.candidates import Candidate

RULES_VERSION = 3  # stands in corpus.json: keys made by other rules cannot be compared
Origin = Literal["header", "pattern", "name"]

_TOKENS = re.compile(r"[^\W\d_]+|\d+")
# Words before a running number: with nothing else beside it, "case_00012" is somebody else in every set.
_GENERIC = {
    "case", "image", "img", "volume", "vol", "scan", "ct", "cta", "cect", "nect", "subject", "subj", "sub", "patient",
    "series", "study", "exam", "acquisition", "sample", "train", "tr", "test", "ts", "val", "validation", "label", "seg",
    "mask", "data", "file", "unknown", "anonymous", "anon",
}  # fmt: skip
_LEAST_LONG = 8  # characters of an id in a header or of a pattern, with a digit
_LEAST_NAMED = 5  # letters and digits that are no generic word, with a digit
_LEAST_NUMBER = 6  # digits, where nothing but a number is left
_FOLDERS_OF_A_NAME = 8  # a file name that stands in more folders of a source says nothing of the patient


@dataclass(frozen=True)
class PatientId:
    """One patient, as far as an id tells.

    Attributes:
        key: Salted hash.
        is_known: Whether the key means the same person in every source and every corpus of this salt.
        is_named: False where no id tells: the key then stands for a study or a file.
    """

    key: str
    is_known: bool
    is_named: bool = True


def normal_id(written: str) -> str:
    """Return an id as it is compared: without case and separators; of a bare number without zeros in front.

    Conversions write LIDC-IDRI-0314 as lidc_idri_0314, and spreadsheets write 00123456 as 123456.
    """
    tokens = _TOKENS.findall(written.casefold())
    if len(tokens) == 1 and tokens[0].isdecimal():
        return tokens[0].lstrip("0") or "0"
    return "-".join(tokens) or written


def named_in_path(pattern: str, inside: str) -> str:
    """Return what a source's `patient_pattern` finds in a path inside it, or ""."""
    match = re.search(pattern, inside) if pattern else None
    return (match.group(1) or "") if match else ""


def means_the_same_everywhere(written: str, origin: Origin) -> bool:
    """Tell whether an id can be compared between sources.

    LIDC-IDRI-0314 and 20731955 mean the same patient wherever they turn up; "1", "case_07" or "anonymous" do not. In doubt it
    is compared: two patients taken for one cost training data, a patient that is not recognised is a leak.

    Args:
        written: The id.
        origin: Where it stands. A header and a pattern name patients on purpose; a file's name may be anything.
    """
    if is_nobody(written) or not any(sign.isdigit() for sign in written):
        return False
    if origin != "name" and len(written) >= _LEAST_LONG:
        return True
    telling = [token for token in _TOKENS.findall(written.casefold()) if token not in _GENERIC]
    if all(token.isdecimal() for token in telling):
        return len("".join(telling).lstrip("0")) >= _LEAST_NUMBER
    return len("".join(telling)) >= _LEAST_NAMED


def key_everywhere(salt: Salt, written: str) -> str:
    """Return a patient's key among all sources."""
    return salt.key("patient", normal_id(written))


def key_inside(salt: Salt, source: str, written: str) -> str:
    """Return a patient's key inside one source."""
    return salt.key("patient", source, normal_id(written))


def patient_id(salt: Salt, source: str, written: str, origin: Origin, stand_in: str) -> PatientId:
    """Return who a volume is of.

    Args:
        salt: Of the corpus.
        source: Name of the source.
        written: The id, as written.
        origin: Where it stands.
        stand_in: Stands for the patient where the id tells nothing: the study, or the file.
    """
    if means_the_same_everywhere(written, origin):
        return PatientId(key_everywhere(salt, written), is_known=True)
    if is_nobody(written) or (origin == "name" and not any(sign.isdigit() for sign in written)):
        return PatientId(salt.key("patient", source, "of", stand_in), is_known=False, is_named=False)
    return PatientId(key_inside(salt, source, written), is_known=False)


def told_by_name(candidates: Sequence["Candidate"], sources: Sequence["SourceConfig"]) -> int:
    """Return of how many volumes nothing but the file's name tells the patient."""
    return sum(item.patient_is_named and _is_told_by_name(item, sources) for item in candidates)


def _is_told_by_name(item: "Candidate", sources: Sequence["SourceConfig"]) -> bool:
    return item.format != "dicom" and not sources[item.source].patient_pattern


def without_common_names(candidates: Sequence["Candidate"], sources: Sequence["SourceConfig"], salt: Salt) -> list["Candidate"]:
    """Take patients back that were read from file names which stand in many folders: `<patient>/thorax_5mm.nii.gz`.

    Args:
        candidates: All of all sources.
        sources: Where they come from.
        salt: Of the corpus.
    """
    folders: dict[tuple[int, str | None], set[str]] = defaultdict(set)
    named = [_is_told_by_name(item, sources) for item in candidates]
    for candidate, is_named in zip(candidates, named, strict=True):
        if is_named:
            folders[candidate.source, candidate.patient_key].add(str(PurePosixPath(candidate.source_path).parent))
    common = {key for key, inside in folders.items() if len(inside) > _FOLDERS_OF_A_NAME}
    return [
        replace(
            item,
            patient_key=salt.key("patient", sources[item.source].name, "of", item.source_path),
            patient_is_known=False,
            patient_is_named=False,
        )
        if is_named and (item.source, item.patient_key) in common
        else item
        for item, is_named in zip(candidates, named, strict=True)
    ]
