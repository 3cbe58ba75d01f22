"""What a corpus says of the data it was compared with: one wording for curation, training and model cards."""

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("exact", "near", "series", "study", "patient")


def says_something(entry: Mapping[str, Any]) -> bool:
    """Tell whether an audit looked at anything: one that read no volume and found nothing is none."""
    return int(entry["volumes"]) > 0 or int(entry["overlaps"]) > 0


def audit_clauses(entry: Mapping[str, Any]) -> list[str]:
    """Return what was found, compared with how much, what could not be compared and why.

    Args:
        entry: One of corpus.json's `audit`.
    """
    first, *more = extent_clauses(entry)
    return [f"{entry['overlaps']} overlaps with {first}", *more]


def extent_clauses(entry: Mapping[str, Any]) -> list[str]:
    """Return with how much a corpus was compared, what could not be and why; not what was found."""
    clauses = [f"{entry['volumes']} volumes"]
    if entry.get("unread"):
        clauses.append(f"{entry['unread']} MORE COULD NOT BE READ")
    if entry.get("no_ct"):
        clauses.append(f"{entry['no_ct']} are no CT")
    kinds = kind_clauses(entry)
    if not kinds:
        return [*clauses, "by what they were compared is not recorded (an earlier version)"]
    return [*clauses, f"compared by {kinds[0]}", *kinds[1:]]


def kind_clauses(entry: Mapping[str, Any]) -> list[str]:
    """Return by which kinds how many volumes were compared, and by which not and why; none where that is not recorded."""
    if "compared" not in entry:
        return []
    compared, why_not = entry["compared"], entry["not_compared"]
    done = [f"{kind} ({compared[kind]})" for kind in KINDS if compared.get(kind)]
    clauses = [", ".join(done) or "nothing"]
    reasons: dict[str, list[str]] = {}
    for kind in KINDS:
        if kind in why_not:
            reasons.setdefault(why_not[kind], []).append(kind)
    for reason, kinds in reasons.items():
        part = "only in part" if all(compared.get(kind) for kind in kinds) else "NOT"
        clauses.append(f"{part} by {', '.join(kinds)}: {reason}")
    return clauses


def audit_text(entry: Mapping[str, Any]) -> str:
    """Return `audit_clauses` as one line."""
    return "; ".join(audit_clauses(entry))


def lists_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what exclusion lists did, or "" where there was none."""
    return "; ".join(
        f"{entry['name']}: {entry['matched']} of {entry['lines']} lines matched, {entry['volumes']} volumes left out"
        + (f", {entry['unread']} of them COULD NOT BE READ" if entry["unread"] else "")
        for entry in entries
    )
