"""The pictures of report.html, from the thumbnails that curation left behind."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from PIL import Image

from meddino.core.html import figure, text
from meddino_data_curation.corpus.work_folder import WorkFolder

_WIDTH_PX = 168
_PAIR_WIDTH_PX = 360
_GAP_PX = 6


def volume_picture(row: Mapping[str, Any], work: WorkFolder, caption: str) -> Markup:
    """Return a volume's middle slice with its short id and a caption, or nothing where there is none."""
    thumbnail = _thumbnail(row, work)
    return figure(base64.b64decode(thumbnail), f"{row['volume_id'][:8]}: {caption}", _WIDTH_PX) if thumbnail else Markup("")


def refused_slice_picture(volume_id: str, reason: str, work: WorkFolder) -> Markup:
    """Return the first slice of a volume that was left out for a reason, or nothing where none was drawn."""
    record = work.read_record(volume_id)
    thumbnail = record.refused.get(reason, "") if record is not None else ""
    return figure(base64.b64decode(thumbnail), f"{volume_id[:8]}: {reason}", _WIDTH_PX // 2) if thumbnail else Markup("")


def pair_picture(row: Mapping[str, Any], kept: Mapping[str, Any], work: WorkFolder) -> Markup:
    """Return a duplicate beside the volume that is kept."""
    caption = f"left out ({row['duplicate_kind']}): {_shape(row)} | kept: {_shape(kept)}"
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in (_thumbnail(row, work), _thumbnail(kept, work)) if data
    ]
    if len(pictures) < 2:
        return text(caption)
    left, right = pictures
    both = Image.new("L", (left.width + right.width + _GAP_PX, max(left.height, right.height)), 255)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP_PX, 0))
    stream = io.BytesIO()
    both.save(stream, "PNG")
    return figure(stream.getvalue(), caption, width_px=_PAIR_WIDTH_PX)


def spacing_text(row: Mapping[str, Any]) -> str:
    """Return a volume's spacing in words."""
    return " x ".join(f"{value:.3g}" for value in row["spacing_mm"]) + " mm"


def _thumbnail(row: Mapping[str, Any], work: WorkFolder) -> str:
    record = work.read_record(row["volume_id"])
    return record.thumbnail if record is not None else ""


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['volume_id'][:8]}, {row['dataset']}, {' x '.join(str(size) for size in row['shape'])}, {spacing_text(row)}"
