"""The pictures of report.html, from the thumbnails that curation left behind."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from markupsafe import Markup
from PIL import Image

from meddino.core.errors import ShardError
from meddino.core.html import figure, text
from meddino.data.corpus import Corpus
from meddino_data_curation.corpus.thumbnails import slice_thumbnail
from meddino_data_curation.corpus.work_folder import VolumeRecord
from meddino_data_curation.selection.modality import Recognised

_WIDTH_PX = 168
_PAIR_WIDTH_PX = 360
_GAP_PX = 6
_SAMPLED_SLICES = 5  # of a volume, for its histogram


@runtime_checkable
class Records(Protocol):
    """What a report is drawn from: the work folder of a build, or the slices of a finished corpus."""

    def read_record(self, volume_id: str) -> VolumeRecord | None:
        """Return what is known of a volume, or None."""

    def read_found(self) -> dict[str, int]:
        """Return how many files the sources hold, by what became of them."""


class CorpusPictures:
    """Pictures and histograms from the slices of finished corpora; of volumes that are not kept there are none.

    Args:
        corpora: Which hold the volumes.
        files: How many files the sources held, by what became of them.
        histogram_edges: Between which stored values are counted.
    """

    def __init__(self, corpora: Sequence[Corpus], files: Mapping[str, int], histogram_edges: Sequence[int]) -> None:
        self.corpora, self.files, self.edges = corpora, dict(files), histogram_edges
        self._slices: dict[str, tuple[int, list[int]]] = {}
        for number, corpus in enumerate(corpora):
            for index, volume_id in enumerate(corpus.slices.column("volume_id").to_pylist()):
                self._slices.setdefault(volume_id, (number, []))[1].append(index)

    def read_found(self) -> dict[str, int]:
        """Return how many files the sources held."""
        return self.files

    def read_record(self, volume_id: str) -> VolumeRecord | None:
        """Return the picture and the histogram of a kept volume."""
        if volume_id not in self._slices:
            return None
        number, indices = self._slices[volume_id]
        corpus = self.corpora[number]
        chosen = indices[:: -(-len(indices) // _SAMPLED_SLICES)]
        try:
            planes = [corpus.read(index) for index in chosen]
        except ShardError:  # `verify` names it
            return None
        values = Recognised(corpus.modality(chosen[0]), value_range=corpus.value_range(chosen[0]))
        counts = [np.histogram(plane, self.edges)[0] for plane in planes if values.modality == "ct"]
        histogram = np.sum(counts, axis=0) if counts else np.zeros(len(self.edges) - 1, dtype=np.int64)
        middle = len(chosen) // 2
        y_mm, x_mm = corpus.spacing_mm[chosen[middle]].tolist()
        thumbnail = slice_thumbnail(values.as_soft_tissue(planes[middle]), (y_mm, x_mm))
        return VolumeRecord("", {}, thumbnail=thumbnail, histogram=histogram.tolist())


def volume_picture(row: Mapping[str, Any], work: Records, caption: str) -> Markup:
    """Return a volume's middle slice with its short id and a caption, or nothing where there is none."""
    thumbnail = _thumbnail(row, work)
    return figure(base64.b64decode(thumbnail), f"{row['volume_id'][:8]}: {caption}", _WIDTH_PX) if thumbnail else Markup("")


def refused_slice_picture(volume_id: str, reason: str, work: Records) -> Markup:
    """Return the first slice of a volume that was left out for a reason, or nothing where none was drawn."""
    record = work.read_record(volume_id)
    thumbnail = record.refused.get(reason, "") if record is not None else ""
    return figure(base64.b64decode(thumbnail), f"{volume_id[:8]}: {reason}", _WIDTH_PX // 2) if thumbnail else Markup("")


def pair_picture(row: Mapping[str, Any], kept: Mapping[str, Any], work: Records) -> Markup:
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


def _thumbnail(row: Mapping[str, Any], work: Records) -> str:
    record = work.read_record(row["volume_id"])
    return record.thumbnail if record is not None else ""


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['volume_id'][:8]}, {row['dataset']}, {' x '.join(str(size) for size in row['shape'])}, {spacing_text(row)}"
