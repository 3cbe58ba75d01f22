"""report.html: what was found, kept and refused, and why; one file to look at and to pass on."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from meddino.core.html import Section, figure, join, key_values, line_chart, page, table, text
from meddino_data_curation.config import CurationConfig, needs_decision
from meddino_data_curation.volume_job import HISTOGRAM_EDGES_HU
from meddino_data_curation.work_folder import WorkFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES = 12
_PAIRS = 12
_SAMPLED_RECORDS = 400  # for histograms; more adds nothing to a picture

Rows = Sequence[Mapping[str, Any]]


def report_page(
    config: CurationConfig, rows: Rows, work: WorkFolder, audits: Sequence[Mapping[str, Any]], num_slices: int
) -> str:
    """Return the report as one HTML page.

    Args:
        config: The curation.
        rows: Rows of volumes.parquet.
        work: Has thumbnails and histograms.
        audits: What corpus.json says of held-out data.
        num_slices: Slices kept.
    """
    status = Counter(str(row["status"]) for row in rows)
    lead = (
        f"{num_slices} slices of {status['accepted']} volumes; {status['rejected']} volumes refused, "
        f"{status['duplicate']} duplicates of others."
    )
    sections = [
        Section("Sets", _sets(config, rows)),
        Section("Kept", _kept(rows, work)),
        Section("Refused", _refused(rows, work)),
        Section("Duplicates", _duplicates(rows, work)),
        Section("Hounsfield units and spacing", _distributions(config, rows, work)),
        Section("Licences and citations", _licences(config)),
        Section("Held-out data", _audits(audits)),
    ]
    return page("Corpus", lead, sections, "Ids are salted hashes; no name, date or path is in this file.")


def _sets(config: CurationConfig, rows: Rows) -> Markup:
    lines = []
    for source in config.sources:
        own = [row for row in rows if row["dataset"] == source.name]
        status = Counter(str(row["status"]) for row in own)
        slices = sum(int(row["num_slices_kept"]) for row in own)
        patients = len({row["patient_key"] for row in own if row["status"] == "accepted"})
        formats = ", ".join(sorted({str(row["format"]) for row in own}))
        lines.append(
            (source.name, len(own), status["accepted"], slices, patients, status["rejected"], status["duplicate"], formats)
        )
    header = ("set", "volumes found", "kept", "slices kept", "patients", "refused", "duplicates", "formats")
    return table(header, lines)


def _kept(rows: Rows, work: WorkFolder) -> Markup:
    kept = [row for row in rows if row["status"] == "accepted"]
    chosen = [kept[index] for index in np.unique(np.linspace(0, len(kept) - 1, min(_PICTURES, len(kept))).astype(int))]
    notes = Counter(note for row in kept for note in str(row["notes"] or "").split("; ") if note)
    parts = [_picture(row, work, f"{row['num_slices_kept']} slices, {_spacing(row)}") for row in chosen]
    if notes:
        parts.append(table(("what is unusual", "volumes"), notes.most_common()))
    return join(*parts)


def _refused(rows: Rows, work: WorkFolder) -> Markup:
    refused = [row for row in rows if row["status"] == "rejected"]
    if not refused:
        return text("Nothing was refused.")
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in refused:
        by_reason[str(row["reason"])].append(row)
    lines = sorted(
        ((reason, len(own), str(own[0]["volume_id"])) for reason, own in by_reason.items()), key=lambda line: -line[1]
    )
    pictures = [_picture(row, work, str(row["reason"])) for row in refused if _thumbnail(row, work)][:_PICTURES]
    return join(table(("reason", "volumes", "for example"), lines), *pictures)


def _duplicates(rows: Rows, work: WorkFolder) -> Markup:
    doubled = [row for row in rows if row["status"] == "duplicate"]
    if not doubled:
        return text("No volume came twice.")
    by_id = {row["volume_id"]: row for row in rows}
    across = Counter((row["dataset"], by_id[row["duplicate_of"]]["dataset"], row["duplicate_kind"]) for row in doubled)
    counts = table(("left out of", "kept in", "kind", "volumes"), [(*key, count) for key, count in sorted(across.items())])
    pairs = [_pair(row, by_id[row["duplicate_of"]], work) for row in doubled[:_PAIRS]]
    return join(counts, *pairs)


def _pair(row: Mapping[str, Any], kept: Mapping[str, Any], work: WorkFolder) -> Markup:
    caption = f"left out ({row['duplicate_kind']}): {_shape(row)} | kept: {_shape(kept)}"
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in (_thumbnail(row, work), _thumbnail(kept, work)) if data
    ]
    if len(pictures) < 2:
        return text(caption)
    both = Image.new("L", (sum(picture.width for picture in pictures) + 6, max(picture.height for picture in pictures)), 255)
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (pictures[0].width + 6, 0))
    stream = io.BytesIO()
    both.save(stream, "PNG")
    return figure(stream.getvalue(), caption, width_px=360)


def _distributions(config: CurationConfig, rows: Rows, work: WorkFolder) -> Markup:
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
        histograms[source.name] = (middles, (counts / max(int(counts.sum()), 1) + 1e-6).tolist())
        values = np.array([row["spacing_mm"] for row in own])
        shapes = np.array([row["shape"] for row in own])
        ranges = [_range(values[:, axis]) for axis in range(3)] + [_range(shapes[:, axis]) for axis in range(3)]
        spacings.append((source.name, *ranges))
    header = ("set", "z [mm]", "y [mm]", "x [mm]", "slices", "rows [px]", "columns [px]")
    drawing: Figure = line_chart(histograms, "Share of pixels by HU", "HU", "share", log_y=True)
    return join(figure(drawing, "Histogram of the kept slices, by set"), table(header, spacings))


def _licences(config: CurationConfig) -> Markup:
    lines = [
        (source.name, source.licence, "allowed by licences.allow" if needs_decision(source.licence) else "", source.citation)
        for source in config.sources
    ]
    return table(("set", "licence", "decision", "citation"), lines)


def _audits(audits: Sequence[Mapping[str, Any]]) -> Markup:
    if not audits:
        return text("Compared with no held-out data. Before testing a model trained on this: meddino-curate audit.", "warning")
    lines = [(entry["name"], entry["volumes"], entry["unread"], entry["left_out"], entry["overlaps"]) for entry in audits]
    return table(("data", "volumes", "not readable", "left out here for it", "overlaps that remain"), lines)


def _picture(row: Mapping[str, Any], work: WorkFolder, caption: str) -> Markup:
    thumbnail = _thumbnail(row, work)
    if not thumbnail:
        return key_values({str(row["volume_id"]): caption})
    return figure(base64.b64decode(thumbnail), f"{row['volume_id'][:8]}: {caption}", width_px=168)


def _thumbnail(row: Mapping[str, Any], work: WorkFolder) -> str:
    record = work.read_record(row["volume_id"])
    return record.thumbnail if record is not None else ""


def _shape(row: Mapping[str, Any]) -> str:
    return f"{' x '.join(str(size) for size in row['shape'])}, {_spacing(row)}, {row['dataset']}"


def _spacing(row: Mapping[str, Any]) -> str:
    return " x ".join(f"{value:.3g}" for value in row["spacing_mm"]) + " mm"


def _range(values: "np.typing.NDArray[Any]") -> str:
    low, middle, high = (float(value) for value in np.quantile(values, (0, 0.5, 1)))
    return f"{middle:.4g}" if low == high else f"{low:.4g} - {middle:.4g} - {high:.4g}"
