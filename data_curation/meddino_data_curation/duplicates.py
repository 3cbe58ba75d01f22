"""Volumes that come more than once: which one of a group is kept."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Duplicate:
    """A volume that is another one again.

    Attributes:
        of: Id of the volume that is kept.
        kind: "exact" or "near".
    """

    of: str
    kind: str


def exact_duplicates(rows: Sequence[Mapping[str, Any]], preference: Mapping[str, int]) -> dict[str, Duplicate]:
    """Find accepted volumes with equal content.

    Args:
        rows: Rows of volumes.parquet.
        preference: By data set; the lowest is kept, then the one with most slices, then the smallest id.

    Returns:
        By id of the volume that is left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "accepted":
            groups[row["content_hash"]].append(row)
    found = {}
    for group in groups.values():
        kept, *others = sorted(group, key=lambda row: preference_key(row, preference))
        found.update({row["volume_id"]: Duplicate(kept["volume_id"], "exact") for row in others})
    return found


def preference_key(row: Mapping[str, Any], preference: Mapping[str, int]) -> tuple[int, int, str]:
    """Return what volumes of a group are sorted by; the first is kept."""
    return preference.get(row["dataset"], 0), -row["num_slices_kept"], row["volume_id"]
