"""By what two sets of volumes can be compared at all, and what corpus.json says of a comparison."""

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

from meddino_data_curation.held_out.scan import HeldOutScan
from meddino_data_curation.selection.duplicates import Overlap, Row

_NEEDED = {
    "exact": "voxels that could be read",
    "near": "a fingerprint (duplicates.near=false, or no usable slice)",
    "series": "DICOM UIDs",
    "study": "DICOM UIDs",
    "patient": "an id that means the same patient elsewhere (see patient_pattern and same_ids)",
}


def unread_problem(name: str, held_out: HeldOutScan, allow_unread: bool, option: str) -> str:
    """Say what is wrong with held-out data that was not looked at: nothing found in it would mean nothing.

    Args:
        name: Of the set.
        held_out: What was read of it.
        allow_unread: Whether some of it may be unread.
        option: That says so.

    Returns:
        A line if no volume could be read, or some could not and that is not allowed; else "".
    """
    unread = held_out.unread.total()
    if not held_out.volumes:
        told = _reasons(held_out.unread + held_out.no_ct)
        return f"{name}: none of {len(held_out.rows)} volumes could be used, so nothing was compared: {told}"
    if unread and not allow_unread:
        return (
            f"{name}: {unread} of {unread + held_out.volumes} volumes could not be read ({_reasons(held_out.unread)}): scans "
            f"of them may be in the corpus unseen; mend them, or accept that with {option}"
        )
    return ""


def _reasons(counts: Counter[str]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(4))


def audit_entry(
    name: str,
    rows: Sequence[Row],
    prints: Container[str],
    held_out: HeldOutScan,
    overlaps: Sequence[Overlap],
    hidden: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what corpus.json says of one comparison; names nobody.

    Args:
        name: Of the held-out set.
        rows: Of the corpus's volumes.
        prints: Ids of the volumes that have a fingerprint.
        held_out: The set.
        overlaps: What was found.
        hidden: Why keys of the corpus's own cannot be compared, by kind.

    Returns:
        name; volumes read, no_ct and unread; a hash of their content; the overlaps by kind; `compared`: how many of the set
        by which kind; `not_compared`: why not, for kinds by which none or not all were.
    """
    content = "\n".join(sorted(str(row["content_hash"]) for row in held_out.rows if row["content_hash"]))
    compared, not_compared = _comparable(rows, prints, held_out, {**(hidden or {}), **held_out.hidden})
    return {
        "name": name,
        "volumes": held_out.volumes,
        "no_ct": held_out.no_ct.total(),
        "unread": held_out.unread.total(),
        "content_hash": hashlib.sha256(content.encode()).hexdigest(),
        "overlaps": len(overlaps),
        "overlaps_by_kind": dict(sorted(Counter(overlap.kind for overlap in overlaps).items())),
        "overlapping_volumes": sorted({overlap.volume_id for overlap in overlaps}),
        "compared": compared,
        "not_compared": not_compared,
    }


def _comparable(
    rows: Sequence[Row], prints: Container[str], held_out: HeldOutScan, hidden: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Return how many held-out volumes could be compared by which kind, and why not all with all."""
    same_ids = any(row.get("patient_keys") for row in held_out.rows)
    own = _numbers([row for row in rows if row["status"] in ("accepted", "duplicate")], prints, same_ids)
    others = _numbers(held_out.rows, held_out.prints, False)
    compared: dict[str, int] = {}
    why_not: dict[str, str] = {}
    for kind, needed in _NEEDED.items():
        compared[kind] = others[kind] if own[kind] else 0
        if kind in hidden:
            compared[kind], why_not[kind] = 0, hidden[kind]
        elif not compared[kind]:
            why_not[kind] = f"no volume of {'the corpus' if not own[kind] else 'it'} has {needed}"
        elif kind in ("near", "patient"):
            whole = "looked at" if kind == "near" else "all"
            lacking = [
                f"{numbers[whole] - numbers[kind]} of {whose} {numbers[whole]}"
                for numbers, whose in ((others, "its"), (own, "the corpus's"))
                if numbers[kind] < numbers[whole]
            ]
            if lacking:
                why_not[kind] = f"{' and '.join(lacking)} volumes lack {needed}"
    return compared, why_not


def _numbers(rows: Sequence[Row], prints: Container[str], same_ids: bool) -> dict[str, int]:
    # The ids of a duplicate speak for the copy that is kept; a fingerprint it need not have.
    looked_at = [row["volume_id"] in prints for row in rows if row["status"] == "accepted"]
    return {
        "all": len(rows),
        "looked at": len(looked_at),
        "exact": sum(bool(row["content_hash"]) for row in rows),
        "near": sum(looked_at),
        "series": sum(row["format"] == "dicom" and bool(row["series_key"]) for row in rows),
        "study": sum(bool(row.get("study_key")) for row in rows),
        "patient": sum(bool(row["patient_key"] and (same_ids or row.get("patient_is_known"))) for row in rows),
    }
