"""What `meddino-curate plan` prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from meddino_data_curation.sources.licences import needs_decision
from meddino_data_curation.sources.plan import FoundSet


def print_plan(found: Sequence[FoundSet], allow: Sequence[str], console: Console) -> None:
    """Print what lies there and what is missing, under which licences, and what is to be kept in mind.

    Args:
        found: From `plan.find_sets`.
        allow: `licences.allow`.
        console: Where to print.
    """
    there = [item for item in found if item.volumes]
    missing = [item for item in found if not item.volumes]
    if there:
        table = Table("set", "found / expected", "state", "licence", "decision", box=None)
        for item in there:
            table.add_row(item.entry.name, _numbers(item), _state(item), item.entry.licence.id, _decision(item, allow))
        console.print(table)
    if missing:
        console.print("\nmissing:")
    # Lines of their own, which no terminal's width breaks: an address cut in two is no address.
    for line in [*(_wanted(item) for item in missing), *_notes(there)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    volumes = sum(item.volumes for item in there)
    console.print(f"\n{len(there)} of {len(found)} sets lie there, {volumes} volumes; {len(missing)} are missing")


def _wanted(item: FoundSet) -> str:
    entry, licence = item.entry, item.entry.licence
    caveat = f"; {entry.caveat}" if entry.caveat else ""
    return (
        f"- {entry.name} ({entry.title}): {_expected(item)}, {licence.id} ({licence.kind}{caveat}), {entry.access}: {entry.url}"
    )


def _expected(item: FoundSet) -> str:
    entry = item.entry
    return f"{entry.volumes} volumes" if entry.volumes or not entry.listed else f"{entry.listed} images in the paper's table"


def _numbers(item: FoundSet) -> str:
    texts = []
    for part in item.parts:
        expected = "?" if part.entry.volumes is None else str(part.entry.volumes)
        texts.append(f"{part.entry.name} {len(part.volumes)}/{expected}")
    return ", ".join(texts)


def _state(item: FoundSet) -> str:
    too_many = any(part.entry.volumes is not None and len(part.volumes) > part.entry.volumes for part in item.parts)
    return "more than expected" if too_many else "complete" if item.is_whole else "incomplete"


def _decision(item: FoundSet, allow: Sequence[str]) -> str:
    licence = item.entry.licence
    if not needs_decision(licence.id):
        return "none needed"
    return "allowed" if licence.id in allow else f"{licence.kind}: needs licences.allow"


def _notes(there: Sequence[FoundSet]) -> list[str]:
    names = {item.entry.name for item in there}
    lines = ["\nbasis of the licences that need a decision, what is not verified, and test data:"] if there else []
    for item in there:
        entry = item.entry
        if needs_decision(entry.licence.id):
            lines.append(f"- {entry.name}: {entry.licence.basis}")
        if entry.caveat:
            lines.append(f"- {entry.name}, {entry.caveat}: read its page before you rely on it, {entry.url}")
        lines.append(f"- {entry.name}, test data: {entry.held_out_rule}")
        if entry.used:
            lines.append(f"- {entry.name}, used by the paper: {entry.used}")
        if entry.tasks:
            lines.append(
                f"- {entry.name} may hold test data of {', '.join(entry.tasks)}: meddino-curate audit CORPUS --against DATA"
            )
        again = sorted(set(entry.repackages) & names)
        if again:
            lines.append(f"- {entry.name} brings scans of {', '.join(again)} again: duplicates are to be expected")
        lines += [f"- {entry.name}, not known: {text}" for text in entry.not_known]
    return lines
