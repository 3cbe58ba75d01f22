"""Volumes that come more than once, and volumes that are held out: which ones are left out, and why."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddino_data_curation.fingerprint import Fingerprint
from meddino_data_curation.near_duplicates import find_alike, find_alike_between, groups

Row = dict[str, Any]


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
    for group in groups(len(accepted), [(pair.first, pair.second) for pair in alike]):
        _keep_one([accepted[index] for index in group], preference, "near")
    _follow_links(rows)


def preference_key(row: Row, preference: Mapping[str, int]) -> tuple[int, int, int, str]:
    """Return what volumes of a group are sorted by, the first is kept: data set, slices kept, pixels a slice, id."""
    return preference.get(row["dataset"], 0), -row["num_slices_kept"], -row["shape"][1] * row["shape"][2], row["volume_id"]


def _keep_one(group: Sequence[Row], preference: Mapping[str, int], kind: str) -> None:
    kept, *others = sorted(group, key=lambda row: preference_key(row, preference))
    for row in others:
        row.update(status="duplicate", duplicate_of=kept["volume_id"], duplicate_kind=kind, num_slices_kept=0)


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

    Args:
        rows: Rows of volumes.parquet of the corpus; only accepted and duplicate ones count.
        prints: Of the corpus, by volume_id.
        held_out: Rows of the held-out volumes, keys salted alike.
        held_out_prints: By volume_id.
    """
    counted = [row for row in rows if row["status"] in ("accepted", "duplicate")]
    found: dict[tuple[str, int], Overlap] = {}
    columns = {"content_hash": "exact", "series_key": "series", "study_key": "study", "patient_key": "patient"}
    for column, kind in columns.items():
        known: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(held_out):
            if row.get(column):
                known[row[column]].append(number)
        for row in counted:
            for number in known.get(row[column] or "", ()):
                found.setdefault((row["volume_id"], number), Overlap(row["volume_id"], number, kind))
    own = [row["volume_id"] for row in counted if row["volume_id"] in prints]
    others = [(number, row["volume_id"]) for number, row in enumerate(held_out) if row["volume_id"] in held_out_prints]
    alike = find_alike_between([prints[name] for name in own], [held_out_prints[name] for _, name in others])
    for pair in alike:
        number = others[pair.second][0]
        overlap = Overlap(own[pair.first], number, "near", pair.similarity)
        if found.get((overlap.volume_id, number), overlap).kind in ("near", "patient", "study"):
            found[overlap.volume_id, number] = overlap  # that the scan is the same says more than whose it is
    return [found[key] for key in sorted(found)]


def exclude_overlaps(rows: Sequence[Row], overlaps: Sequence[Overlap]) -> None:
    """Refuse the volumes that overlap with held-out data, in place."""
    by_id = {row["volume_id"]: row for row in rows}
    for overlap in overlaps:
        row = by_id[overlap.volume_id]
        same = "the same scan" if overlap.kind in ("exact", "near") else f"the same {overlap.kind}"
        row.update(status="rejected", reason=f"held out: {same} is in the excluded data", num_slices_kept=0)
        row.update(duplicate_of=None, duplicate_kind=None)
    for row in rows:  # a copy of a held-out scan is held out, however it was found to be one
        if row["status"] == "duplicate" and by_id[row["duplicate_of"]]["status"] == "rejected":
            row.update(status="rejected", reason="held out: the same scan is in the excluded data")
            row.update(duplicate_of=None, duplicate_kind=None)
