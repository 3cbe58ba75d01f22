"""Volumes that come more than once, and volumes that are held out: which ones are left out, and why."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddino_data_curation.selection.fingerprint import Fingerprint
from meddino_data_curation.selection.near_duplicates import find_alike, find_alike_between, groups

Row = dict[str, Any]
_FEW_SLICES = 3
_SAME_PLACE_MM = 0.5
_PATIENTS_OF_A_STUDY = 4  # more of them: a tool that wrote one study UID into everything


@dataclass(frozen=True)
class Overlap:
    """A volume that is, or belongs to the patient of, a held-out one.

    Attributes:
        volume_id: Of the volume in the corpus.
        other: Index of the held-out one.
        kind: "patient", "study", "series", "exact" or "near".
        similarity: Of near ones; else 1.
    """

    volume_id: str
    other: int
    kind: str
    similarity: float = 1.0


def mark_exact(rows: Sequence[Row], preference: Mapping[str, int]) -> None:
    """Mark accepted volumes whose voxels another accepted one has too; the preferred one of each group stays.

    Args:
        rows: Rows of volumes.parquet, changed in place.
        preference: By data set; see `preference_key`.
    """
    by_content: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "accepted":
            by_content[row["content_hash"]].append(row)
    for group in by_content.values():
        _keep_one(group, preference, "exact")


def mark_near(rows: Sequence[Row], prints: Mapping[str, Fingerprint], preference: Mapping[str, int]) -> None:
    """Mark accepted volumes that show the same scan as a preferred one in another guise.

    Args:
        rows: Rows of volumes.parquet, changed in place; exact duplicates are marked already.
        prints: By volume_id.
        preference: By data set.
    """
    accepted = [row for row in rows if row["status"] == "accepted" and row["volume_id"] in prints]
    alike = find_alike([prints[row["volume_id"]] for row in accepted])
    links = [(pair.first, pair.second) for pair in alike if not _are_told_apart(accepted[pair.first], accepted[pair.second])]
    # Few slices look like their neighbours: of one patient a link means these two only, not what they are linked to.
    single = [(first, second) for first, second in links if _are_few_of_one_patient(accepted[first], accepted[second])]
    for group in groups(len(accepted), [link for link in links if link not in set(single)]):
        _keep_one([accepted[index] for index in group], preference, "near")
    for first, second in sorted(single, key=lambda link: sorted(preference_key(accepted[one], preference) for one in link)):
        if accepted[first]["status"] == accepted[second]["status"] == "accepted":
            _keep_one([accepted[first], accepted[second]], preference, "near")
    _follow_links(rows)


def _of_one_patient(first: Row, second: Row) -> bool:
    same_study = first.get("study_key") is not None and first.get("study_key") == second.get("study_key")
    return same_study or (first["patient_key"] is not None and first["patient_key"] == second["patient_key"])


def _are_few_of_one_patient(first: Row, second: Row) -> bool:
    return max(first["shape"][0], second["shape"][0]) <= _FEW_SLICES and _of_one_patient(first, second)


def _are_told_apart(first: Row, second: Row) -> bool:
    """Tell whether what looks alike is known to be no copy: of a series that was parted its headers say so."""
    return _series(first) == _series(second) or _lie_apart(first, second)


def _lie_apart(first: Row, second: Row) -> bool:
    """Tell whether two volumes of one patient show different places: slices and slabs above one another are no copies."""
    if first["spacing_mm"] is None or second["spacing_mm"] is None:
        return False
    # 0 is what a file says that has lost its place.
    if not first.get("position_mm") or not second.get("position_mm") or not _of_one_patient(first, second):
        return False
    (low, high), (other_low, other_high) = (
        (row["position_mm"], row["position_mm"] + (row["shape"][0] - 1) * row["spacing_mm"][0]) for row in (first, second)
    )
    return bool(max(low, other_low) - min(high, other_high) > _SAME_PLACE_MM)


def preference_key(row: Row, preference: Mapping[str, int]) -> tuple[int, int, int, int, str]:
    """Return what volumes of a group are sorted by, the first is kept: edition, data set, slices, pixels a slice, content.

    Not the id: with another salt another copy would be kept. Of equal content the order of the rows decides.
    """
    pixels = row["shape"][1] * row["shape"][2]
    edition = row.get("edition", 0)  # what a corpus holds already is not taken out for a newcomer
    return edition, preference.get(row["dataset"], 0), -row["num_slices_kept"], -pixels, row["content_hash"]


def _keep_one(group: Sequence[Row], preference: Mapping[str, int], kind: str) -> None:
    kept, *others = sorted(group, key=lambda row: preference_key(row, preference))
    parted = {_series(kept)}
    for row in others:
        # Of the parts of one series at most one is a copy of what is kept: their headers tell them apart.
        if kind == "near" and _series(row) in parted:
            continue
        parted.add(_series(row))
        row.update(status="duplicate", duplicate_of=kept["volume_id"], duplicate_kind=kind, num_slices_kept=0)


def _series(row: Row) -> tuple[str, str]:
    """Return what the parts of a DICOM series share and nothing else has; a copy of it in another data set is none."""
    return row["dataset"], str(row["series_key"] if row["format"] == "dicom" else row["volume_id"])


def _follow_links(rows: Sequence[Row]) -> None:
    """Let links lead to a volume that is kept: an exact duplicate's original may have become a near duplicate itself."""
    by_id = {row["volume_id"]: row for row in rows}
    for row in rows:
        if row["status"] == "duplicate" and by_id[row["duplicate_of"]]["status"] == "duplicate":
            row.update(duplicate_of=by_id[row["duplicate_of"]]["duplicate_of"], duplicate_kind="near")


def find_overlaps(
    rows: Sequence[Row], prints: Mapping[str, Fingerprint], held_out: Sequence[Row], held_out_prints: Mapping[str, Fingerprint]
) -> list[Overlap]:
    """Find every overlap between volumes and held-out ones: by content, by look, by patient, study and series.

    A volume that matches leads to others: to its copies, and to what else is of its study and its patient. So a held-out scan
    that says nothing of its patient keeps that patient's other scans out too, and an id on one copy speaks for all of them.

    Args:
        rows: Rows of volumes.parquet of the corpus; refused ones lead to others, but are no overlap themselves.
        prints: Of the corpus, by volume_id.
        held_out: Rows of the held-out volumes, keys salted alike. `patient_keys` has more keys of the patient.
        held_out_prints: By volume_id.
    """
    found = _matches_by_key(rows, held_out)
    own = [row["volume_id"] for row in rows if row["volume_id"] in prints]
    others = [(number, row["volume_id"]) for number, row in enumerate(held_out) if row["volume_id"] in held_out_prints]
    alike = find_alike_between([prints[name] for name in own], [held_out_prints[name] for _, name in others])
    for pair in alike:
        number = others[pair.second][0]
        overlap = Overlap(own[pair.first], number, "near", pair.similarity)
        if found.get((overlap.volume_id, number), overlap).kind in ("near", "patient", "study"):
            found[overlap.volume_id, number] = overlap  # that the scan is the same says more than whose it is
    overlaps = with_relatives(rows, [found[key] for key in sorted(found)])
    counted = {row["volume_id"] for row in rows if row["status"] in ("accepted", "duplicate")}
    return [overlap for overlap in overlaps if overlap.volume_id in counted]


def _matches_by_key(rows: Sequence[Row], held_out: Sequence[Row]) -> dict[tuple[str, int], Overlap]:
    found: dict[tuple[str, int], Overlap] = {}
    for kind in ("exact", "series", "study", "patient"):
        known: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(held_out):
            for key in _keys(row, kind):
                known[key].append(number)
        for row in rows:
            for key in _keys(row, kind):
                for number in known.get(key, ()):
                    found.setdefault((row["volume_id"], number), Overlap(row["volume_id"], number, kind))
    return found


def _keys(row: Row, kind: str) -> set[str]:
    """Return by what a volume can be known; a file's series is its path, which means nothing in another set."""
    match kind:
        case "exact":
            keys = {row["content_hash"]}
        case "series":
            keys = {row["series_key"]} if row["format"] == "dicom" else set()
        case "study":
            keys = {row.get("study_key")}
        case _:
            keys = {row["patient_key"], *row.get("patient_keys", ())}
    return {key for key in keys if key}


def with_relatives(rows: Sequence[Row], overlaps: Sequence[Overlap]) -> list[Overlap]:
    """Return overlaps and, after them, those to which they lead: copies of a volume, and what is of its study and patient.

    Args:
        rows: All of the corpus, duplicates marked.
        overlaps: Found so far.
    """
    if not overlaps:
        return []
    links: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for link in _links(row):
            links[link].append(row["volume_id"])
    by_id = {row["volume_id"]: row for row in rows}
    for link, members in list(links.items()):
        if link[0] == "study" and len({by_id[name]["patient_key"] for name in members}) > _PATIENTS_OF_A_STUDY:
            del links[link]
    # What is the same scan comes first: its copies are then told to be that scan, not only of that patient.
    ordered = sorted(overlaps, key=lambda overlap: (overlap.kind not in ("exact", "near"), overlap.volume_id, overlap.other))
    reached = {overlap.volume_id: overlap for overlap in reversed(ordered)}
    waiting = [overlap for overlap in ordered if reached[overlap.volume_id] is overlap]
    found = list(overlaps)
    while waiting:
        later = []
        for overlap in waiting:
            for link in _links(by_id[overlap.volume_id]):
                for volume_id in links.pop(link, ()):
                    if volume_id not in reached:
                        kind = overlap.kind if link[0] == "copy" else "patient"
                        reached[volume_id] = Overlap(volume_id, overlap.other, kind, overlap.similarity)
                        later.append(reached[volume_id])
                        found.append(reached[volume_id])
        waiting = later
    return found


def _links(row: Row) -> list[tuple[str, str]]:
    """Return what a volume shares with its copies, and with what else is of its patient."""
    copies = {row["content_hash"], row["duplicate_of"] or row["volume_id"]}
    others = [("study", row.get("study_key")), ("patient", row["patient_key"])]
    return [("copy", key) for key in sorted(filter(None, copies))] + [(kind, key) for kind, key in others if key]


def exclude_overlaps(rows: Sequence[Row], overlaps: Sequence[Overlap], where: str = "is in the excluded data") -> int:
    """Refuse the volumes that overlap with held-out data, in place.

    Args:
        rows: Rows of volumes.parquet.
        overlaps: With all relatives.
        where: What holds the same scan or patient.

    Returns:
        How many volumes were refused for it.
    """
    by_id = {row["volume_id"]: row for row in rows}
    refused: set[str] = set()
    for overlap in overlaps:
        row = by_id[overlap.volume_id]
        if row["status"] == "rejected":
            continue
        same = "the same scan" if overlap.kind in ("exact", "near") else f"the same {overlap.kind}"
        row.update(status="rejected", reason=f"held out: {same} {where}", num_slices_kept=0)
        row.update(duplicate_of=None, duplicate_kind=None)
        refused.add(overlap.volume_id)
    return len(refused)
