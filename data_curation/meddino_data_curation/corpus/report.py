"""report.html: what was found, kept and refused, and why; one file to look at and to pass on."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from meddino.core.html import Section, join, page, table, text
from meddino.core.html_charts import chart
from meddino.data.audits import kind_clauses, lists_text
from meddino.data.intensity import window_text
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.manifests import patients_of, patients_text
from meddino_data_curation.corpus.report_pictures import Records as Pictures
from meddino_data_curation.corpus.report_pictures import pair_picture, refused_slice_picture, spacing_text, volume_picture
from meddino_data_curation.selection.volume_job import HISTOGRAM_EDGES_HU
from meddino_data_curation.sources.licences import needs_decision

_PICTURES = 12
_PER_REASON = 3
_PAIRS = 12
_PER_ROUTE = 4
_SAMPLED_RECORDS = 400  # for histograms; more adds nothing to a picture
_AUDIT_BEGIN, _AUDIT_END = "<!-- audit begins -->", "<!-- audit ends -->"

Rows = Sequence[Mapping[str, Any]]
Records = Sequence[Mapping[str, Any]]


def report_page(config: CurationConfig, rows: Rows, work: Pictures, audits: Records, lists: Records = ()) -> str:
    """Return the report as one HTML page.

    Args:
        config: The curation.
        rows: Rows of volumes.parquet.
        work: Has thumbnails and histograms.
        audits: What corpus.json says of held-out data.
        lists: What it says of exclusion lists.
    """
    status = Counter(str(row["status"]) for row in rows)
    slices = sum(int(row["num_slices_kept"]) for row in rows if row["status"] == "accepted")
    lead = (
        f"{slices} slices of {status['accepted']} volumes; {status['rejected']} volumes refused, "
        f"{status['duplicate']} duplicates of others."
    )
    sections = [
        Section("Sets", _sets(config, rows)),
        Section("Files", _files(work)),
        Section("Held-out data", _audit_section(audits, lists)),
        Section("Licences and citations", _licences(config)),
        Section("Kept", _kept(rows, work)),
        Section("Refused volumes", _refused(rows, work)),
        Section("Slices left out", _left_out(rows, work)),
        Section("Duplicates", _duplicates(rows, work)),
        Section("Hounsfield units and spacing", _distributions(config, rows, work)),
    ]
    return page("Corpus", lead, sections, "Ids are salted hashes; no name, date or path is in this file.")


def with_audits(report: str, audits: Records, lists: Records = ()) -> str | None:
    """Return a report that tells of other audits, or None where it has no place for them.

    Args:
        report: The page, from `report_page`.
        audits: What corpus.json says now.
        lists: What it says of exclusion lists.
    """
    pattern = re.escape(_AUDIT_BEGIN) + ".*?" + re.escape(_AUDIT_END)
    renewed, count = re.subn(pattern, lambda _: str(_audit_section(audits, lists)), report, count=1, flags=re.DOTALL)
    return renewed if count else None


def _sets(config: CurationConfig, rows: Rows) -> Markup:
    lines = []
    for source in config.sources:
        own = [row for row in rows if row["dataset"] == source.name]
        status = Counter(str(row["status"]) for row in own)
        slices = sum(int(row["num_slices_kept"]) for row in own)
        patients = patients_text(patients_of(own))
        formats = ", ".join(sorted({str(row["format"]) for row in own}))
        lines.append(
            (source.name, len(own), status["accepted"], slices, patients, status["rejected"], status["duplicate"], formats)
        )
    header = ("set", "volumes found", "kept", "slices kept", "patients", "refused", "duplicates", "formats")
    return table(header, lines)


def _files(work: Pictures) -> Markup:
    found = sorted(work.read_found().items(), key=lambda item: (-item[1], item[0]))
    about = "A volume file makes one line of volumes.parquet; DICOM files make one a stack. What could not be read or is of a "
    more = 'format that is not read may have been meant as a volume; "other" is what lies beside volumes.'
    return join(text(about + more), table(("files", "how many"), found))


def _kept(rows: Rows, work: Pictures) -> Markup:
    kept = [row for row in rows if row["status"] == "accepted"]
    chosen = [kept[index] for index in np.unique(np.linspace(0, len(kept) - 1, min(_PICTURES, len(kept))).astype(int))]
    notes = Counter(note for row in kept for note in str(row["notes"] or "").split("; ") if note)
    window = f"The middle slice of each, CT in the {window_text()}, others by their volume's range."
    pictures = [volume_picture(row, work, f"{row['num_slices_kept']} slices, {spacing_text(row)}") for row in chosen]
    parts = [text(window), *pictures] if any(pictures) else []
    if notes:
        parts.append(table(("what is unusual", "volumes"), notes.most_common()))
    return join(*(part for part in parts if part))


def _refused(rows: Rows, work: Pictures) -> Markup:
    refused = [row for row in rows if row["status"] == "rejected"]
    if not refused:
        return text("Nothing was refused.")
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in refused:
        by_reason[str(row["reason"])].append(row)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    lines = [
        (reason, len(own), ", ".join(sorted({str(row["dataset"]) for row in own})), str(own[0]["volume_id"]))
        for reason, own in ordered
    ]
    pictures: list[Markup] = []
    for reason, own in ordered:
        if len(pictures) < _PICTURES:
            pictures += [picture for row in own[:_PER_REASON] if (picture := volume_picture(row, work, reason))]
    return join(table(("reason", "volumes", "sets", "for example"), lines), *pictures[:_PICTURES])


def _left_out(rows: Rows, work: Pictures) -> Markup:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for reason, count in row["slices_left_out"].items():
            counts[str(row["dataset"]), reason] += count
            if len(examples[reason]) < _PER_REASON:
                examples[reason].append(str(row["volume_id"]))
    if not counts:
        return text("Every slice of the kept volumes is in the corpus.")
    pictures = [refused_slice_picture(volume_id, reason, work) for reason in sorted(examples) for volume_id in examples[reason]]
    lines = [(dataset, reason, count) for (dataset, reason), count in sorted(counts.items())]
    return join(table(("set", "reason", "slices"), lines), *(picture for picture in pictures if picture))


def _duplicates(rows: Rows, work: Pictures) -> Markup:
    doubled = [row for row in rows if row["status"] == "duplicate"]
    if not doubled:
        return text("No volume came twice.")
    by_id = {row["volume_id"]: row for row in rows}
    routes: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in doubled:
        routes[row["dataset"], by_id[row["duplicate_of"]]["dataset"], row["duplicate_kind"]].append(row)
    counts = table(("left out of", "kept in", "kind", "volumes"), [(*route, len(own)) for route, own in sorted(routes.items())])
    shown = [row for _, own in sorted(routes.items()) for row in own[:_PER_ROUTE]][:_PAIRS]
    return join(counts, *(pair_picture(row, by_id[row["duplicate_of"]], work) for row in shown))


def _distributions(config: CurationConfig, rows: Rows, work: Pictures) -> Markup:
    middles = [(low + high) / 2 for low, high in pairwise(HISTOGRAM_EDGES_HU)]
    histograms: dict[str, tuple[list[float], list[float]]] = {}
    spacings: list[tuple[str, ...]] = []
    for source in config.sources:
        own = [row for row in rows if row["dataset"] == source.name and row["status"] == "accepted"]
        if not own:
            continue
        step = -(-len(own) // _SAMPLED_RECORDS)
        records = [work.read_record(row["volume_id"]) for row in own[::step]]
        counts = np.sum([record.histogram for record in records if record is not None], axis=0)
        if int(np.sum(counts)):  # only CT is counted
            histograms[source.name] = (middles, (counts / int(counts.sum()) + 1e-6).tolist())
        values = np.array([row["spacing_mm"] for row in own])
        shapes = np.array([row["shape"] for row in own])
        ranges = [_range(values[:, axis]) for axis in range(3)] + [_range(shapes[:, axis]) for axis in range(3)]
        spacings.append((source.name, *ranges))
    header = ("set", "z [mm]", "y [mm]", "x [mm]", "slices", "rows [px]", "columns [px]")
    drawn = chart(histograms, "Share of the kept pixels by HU, by set", "HU", "share", log_y=True)
    ranges_note = text("Least, median and most of the kept volumes, as they were read.")
    said = drawn or text("No CT was kept: there are no Hounsfield units to count.")
    return join(said, ranges_note, table(header, spacings))


def _licences(config: CurationConfig) -> Markup:
    lines = [(source.name, source.licence_text, _decision(source.licence), source.citation) for source in config.sources]
    return table(("set", "licence", "decision", "citation"), lines)


def _decision(licence: str | None) -> str:
    if licence is None:
        return "nobody named one: right for one's own scans only"
    return "allowed by licences.allow" if needs_decision(licence) else ""


def _audit_section(audits: Records, lists: Records) -> Markup:
    """Return audits and lists between marks, by which `with_audits` finds them again."""
    named = text(f"Left out by lists: {lists_text(lists)}.", "note") if lists else Markup("")
    return join(Markup(_AUDIT_BEGIN), _audits(audits), named, Markup(_AUDIT_END))


def _audits(audits: Records) -> Markup:
    if not audits:
        return text("Compared with no held-out data. Before testing a model trained on this: meddino-curate audit.", "warning")
    lines = []
    for entry in audits:
        kinds = ", ".join(f"{count} by {kind}" for kind, count in entry["overlaps_by_kind"].items())
        ids = ", ".join(volume_id[:8] for volume_id in entry["overlapping_volumes"][:_PICTURES])
        numbers = (entry["volumes"], entry["unread"], entry.get("left_out"), entry["overlaps"])
        compared = "; ".join(kind_clauses(entry))
        lines.append((entry["name"], *numbers, kinds, ids, compared))
    header = (
        "data", "volumes", "not readable", "left out here for it", "overlaps that remain", "kinds", "volumes concerned",
        "compared by (how many of its volumes)",
    )  # fmt: skip
    if any(entry["overlaps"] for entry in audits):
        warning = text("This corpus holds data that must stay unseen: build it again with --exclude.", "warning")
        return join(warning, table(header, lines))
    if any(entry["unread"] for entry in audits):
        warning = text("Some held-out volumes could not be read: scans of them may be in this corpus.", "warning")
        return join(warning, table(header, lines))
    return join(text("No overlap with the data below is known.", "note"), table(header, lines))


def _range(values: "np.typing.NDArray[Any]") -> str:
    low, middle, high = (float(value) for value in np.quantile(values, (0, 0.5, 1)))
    return f"{middle:.4g}" if low == high else f"{low:.4g} - {middle:.4g} - {high:.4g}"
