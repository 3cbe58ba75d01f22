"""`meddino-curate show` and `sample`: a corpus in a screen, and in a picture."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from meddino.core.files import atomic_write, remove_leftovers_of
from meddino.core.seeds import numpy_rng
from meddino.data.audits import audit_text, lists_text, says_something
from meddino.data.corpus import Corpus
from meddino_data_curation.corpus.manifests import patients_text
from meddino_data_curation.corpus.thumbnails import WINDOW_HU, in_proportion, window_picture

_TILE_PX = 192
_CAPTION_PX = 14


def show(root: Path | str, console: Console) -> None:
    """Print what a corpus holds.

    Args:
        root: The corpus, or its URL.
        console: Where to print.
    """
    corpus = Corpus(root)
    info, totals = corpus.info, corpus.info["totals"]
    console.print(f"[bold]{corpus.location}[/bold]  content {corpus.content_hash[:16]}  schema {info['schema_version']}")
    console.print(
        f"{len(corpus)} slices of {totals['accepted']} volumes; {totals['rejected']} volumes refused, "
        f"{totals['duplicate']} duplicates; {len(info['shards'])} shards, {totals['shard_bytes'] / 2**20:.1f} MiB"
    )
    sets = Table("set", "licence", "volumes", "slices", "refused", "duplicates", "patients", box=None)
    for source in info["sources"]:
        cells = (source[name] for name in ("name", "licence", "accepted", "slices", "rejected", "duplicate"))
        patients = patients_text(source) if "patients" in source else "not recorded"
        sets.add_row(*(str(cell) for cell in cells), patients)
    console.print(sets)
    rows, cols = (corpus.slices.column(name).to_numpy() for name in ("rows", "cols"))
    spacing = corpus.spacing_mm
    ranges = Table("per slice", "least", "median", "most", box=None)
    for name, values in (("rows [px]", rows), ("columns [px]", cols), ("pixel [mm]", spacing[:, 0])):
        ranges.add_row(name, *(f"{value:.4g}" for value in (values.min(), np.median(values), values.max())))
    console.print(ranges)
    reasons = corpus.volumes.filter(np.asarray(corpus.volumes.column("status").to_pylist()) == "rejected").column("reason")
    for entry in sorted(reasons.value_counts().to_pylist(), key=lambda item: -item["counts"])[:10]:
        console.print(f"refused {entry['counts']} x {entry['values']}")
    lists = info.get("exclusion_lists", [])
    if lists:
        console.print(f"left out by lists: {lists_text(lists)}")
    audits = info.get("audit", [])
    if not any(says_something(entry) for entry in audits):
        console.print("audited against: nothing")
    for entry in audits:
        left_out = f"; {entry['left_out']} volumes were left out for it" if "left_out" in entry else ""
        console.print(f"audited against {entry['name']}: {audit_text(entry)}{left_out}", markup=False)


def write_contact_sheet(root: Path | str, out: Path, count: int, seed: int) -> None:
    """Draw slices at random onto one PNG: axial slices only, in which nobody can be recognised.

    All CT is shown in one window, which stands above the slices; what has no unit in the range of its volume.

    Args:
        root: The corpus, or its URL.
        out: PNG to write.
        count: How many slices.
        seed: Which ones.
    """
    corpus = Corpus(root)
    chosen = numpy_rng(seed, "contact sheet").choice(len(corpus), size=min(count, len(corpus)), replace=False)
    columns = max(1, min(8, round(len(chosen) ** 0.5 * 1.3)))
    rows = -(-len(chosen) // columns)
    title = f"CT from {WINDOW_HU[0]:g} to {WINDOW_HU[1]:g} HU"
    if any(corpus.modality(int(index)) != "ct" for index in chosen):
        title += "; others in the range of their volume"
    sheet = Image.new("RGB", (columns * _TILE_PX, _CAPTION_PX + rows * (_TILE_PX + _CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 1), title, fill=0)
    for place, index in enumerate(sorted(int(number) for number in chosen)):
        x, y = (place % columns) * _TILE_PX, _CAPTION_PX + (place // columns) * (_TILE_PX + _CAPTION_PX)
        sheet.paste(_tile(corpus, index), (x, y))
        draw.text((x + 2, y + _TILE_PX + 1), _caption(corpus, index), fill=0)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    remove_leftovers_of(out)
    with atomic_write(out) as file:
        file.write(stream.getvalue())


def _caption(corpus: Corpus, index: int) -> str:
    """Return a text narrower than a tile: the volume's id in short, the slice, its spacing."""
    volume_id, z_index, spacing = (corpus.slices.column(name)[index].as_py() for name in ("volume_id", "z_index", "spacing_mm"))
    return f"{volume_id[:8]} z {z_index}" + (f" {spacing[0]:.2f} mm" if spacing is not None else "")


def _tile(corpus: Corpus, index: int) -> Image.Image:
    shown = corpus.value_range(index) or WINDOW_HU
    spacing_mm = corpus.spacing_mm[index]
    picture = window_picture(corpus.read(index), shown)
    picture = in_proportion(picture, (spacing_mm[0], spacing_mm[1]), _TILE_PX, Image.Resampling.BILINEAR)
    tile = Image.new("RGB", (_TILE_PX, _TILE_PX))
    tile.paste(picture, ((_TILE_PX - picture.width) // 2, (_TILE_PX - picture.height) // 2))
    return tile
