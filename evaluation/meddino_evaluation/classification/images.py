"""Slices of a case for models that see one slice at a time, from any file that `meddino.volumes` reads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.errors import VolumeError
from meddino.data.intensity import MEMBERS, Modality
from meddino.data.stored_values import percentile_range, value_range
from meddino.volumes.archives import archive_of, is_archive
from meddino.volumes.file_kinds import volume_suffix
from meddino.volumes.orientation import turn_to_lps
from meddino.volumes.pictures import ARRAY_SUFFIXES, PICTURE_ERRORS, PICTURE_SUFFIXES, Picture, read_picture, split_source
from meddino.volumes.read import FoundSeries, find_series, read_volume

MOST_NOTES = 20  # lines in a report; some name numbers of their own volume


@dataclass(frozen=True)
class SliceStack:
    """One or more slices as they were stored.

    Attributes:
        values: [S, C, H, W], the file's own data type; C is 1 or 3.
        kind: "hu": Hounsfield units. "unit": brightness that `low` and `high` bring to [0, 1].
        low: Value that becomes 0.
        high: Value that becomes 1.
        modality: DICOM's code where the file says it, else "".
        notes: What was assumed or left out when the file was read.
    """

    values: NDArray[Any]
    kind: Literal["hu", "unit"]
    low: float = 0.0
    high: float = 1.0
    modality: str = ""
    notes: tuple[str, ...] = ()

    def tensor(self, start: int, stop: int) -> Tensor:
        """Return slices [n, C, H, W] as float32: Hounsfield units, or brightness in [0, 1]."""
        values = torch.from_numpy(np.ascontiguousarray(self.values[start:stop]).astype(np.float32))
        if self.kind == "hu":
            return values
        return ((values - self.low) / max(self.high - self.low, 1e-12)).clamp(0, 1)


def read_slices(source: str, modality: Modality) -> SliceStack:
    """Read a case.

    Args:
        source: A file; `file.npz#name` for one array of an npz, `file.npz#name#i` for item i of that array,
            `file.mat#path` for one of a MATLAB file; a folder or an archive that holds one volume.
        modality: "ct": values are Hounsfield units. Others: a picture file by the range of its type, a DICOM picture
            (a radiograph) by its percentiles whatever its window says, a volume by the range of its modality.

    Raises:
        VolumeError: Missing, unreadable, too large, not finite, or all of one value; names the file.
    """
    path, key = split_source(source)
    try:
        stack = _read(path, key, modality)
    except (OSError, *PICTURE_ERRORS) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise VolumeError(f"image {source} cannot be read: {reason}") from error
    if np.issubdtype(stack.values.dtype, np.floating) and not np.isfinite(stack.values).all():
        raise VolumeError(f"image {source} holds values that are not finite (NaN or infinity)")
    if not stack.values.size or stack.values.min() == stack.values.max():
        raise VolumeError(
            f"image {source} is constant: every value is {stack.values.flat[0] if stack.values.size else 'missing'}"
        )
    return stack


def _read(path: Path, key: str, modality: Modality) -> SliceStack:
    if not path.exists() and archive_of(path) is None:
        raise VolumeError(f"image {path} does not exist")
    is_volume = path.is_dir() or is_archive(path.name) or volume_suffix(path.name)
    if is_volume or any(series.stack is not None for series in _series(path)):
        volume = read_volume(path)
        turned = turn_to_lps(volume.geometry).apply(volume.voxels)[:, None]
        if volume.modality == "CT":
            return SliceStack(turned, "hu", modality="CT", notes=volume.notes)
        return replace(_stack(Picture(turned), modality), modality=volume.modality, notes=volume.notes)
    picture = read_picture(path, key)
    return replace(_stack(picture, modality), modality=picture.modality, notes=(picture.note,) if picture.note else ())


class ReadingNotes:
    """What was assumed or left out when images were read: each thing once, with how many images it is true of."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def add(self, name: str, stack: SliceStack) -> None:
        """Take up what is to be told of an image; the same image again counts once."""
        for note in stack.notes:
            self._names.setdefault(note, set()).add(name)

    def lines(self) -> list[str]:
        """Return a line for each thing, what is true of most images first, of the rare ones how many there are."""
        order = sorted(self._names, key=lambda note: (-len(self._names[note]), note))
        lines = [f"{len(self._names[note])} images, {min(self._names[note])} the first: {note}" for note in order[:MOST_NOTES]]
        return [*lines, *([f"{len(order) - MOST_NOTES} more notes of reading"] if len(order) > MOST_NOTES else [])]


def _series(path: Path) -> list[FoundSeries]:
    return [] if path.name.lower().endswith((*PICTURE_SUFFIXES, *ARRAY_SUFFIXES)) else find_series(path)


def _stack(picture: Picture, modality: Modality) -> SliceStack:
    values = picture.values
    # A photograph of a CT slice is brightness, whatever it shows: its Hounsfield units are gone. 16 bits may hold them.
    if picture.modality == "CT" or (modality == "ct" and picture.value_range != (0.0, 255.0)):
        return SliceStack(values, "hu")
    if picture.value_range is not None:
        return SliceStack(values, "unit", *picture.value_range)
    if values.dtype == np.uint8:
        return SliceStack(values, "unit", 0.0, 255.0)
    is_picture = MEMBERS[modality].units == "brightness"
    return SliceStack(values, "unit", *(percentile_range(values) if is_picture else value_range(modality, values)))
