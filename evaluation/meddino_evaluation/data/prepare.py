"""From a case on disk to slices a model reads: turned to LPS, resampled in-plane, stored slice by slice in Blosc2."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import blosc2
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.errors import VolumeError
from meddino.data.content import volume_hash
from meddino.data.intensity import MEMBERS, Modality
from meddino.data.stored_values import stored_type, value_range
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import Turn, turn_to_lps
from meddino_evaluation.data.case import LabelMapCase
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.data.labels import IGNORED

MAX_NARROW_LABEL = 32767
"""Larger label values are stored as int32."""
MAX_SIDE_PX = 4096
"""A resampled slice with a longer side is refused: the spacing asked for is surely not meant."""


@dataclass(frozen=True)
class GridRule:
    """Which in-plane grid slices are brought to.

    Attributes:
        spacing_mm: Target spacing, or None.
        size_px: Target length of the longer side, or None. With neither, slices stay as they are.
    """

    spacing_mm: float | None = None
    size_px: int | None = None

    def target(self, rows: int, cols: int, spacing_mm: tuple[float, float]) -> tuple[int, int]:
        """Return rows and columns after resampling.

        Raises:
            VolumeError: The result would be absurdly large.
        """
        height_mm, width_mm = rows * spacing_mm[0], cols * spacing_mm[1]
        if self.spacing_mm is not None:
            step = self.spacing_mm
        elif self.size_px is not None:
            step = max(height_mm, width_mm) / self.size_px
        else:
            return rows, cols
        new = max(1, round(height_mm / step)), max(1, round(width_mm / step))
        if max(new) > MAX_SIDE_PX:
            raise VolumeError(f"{rows} x {cols} pixels of {spacing_mm} mm would become {new[0]} x {new[1]} at {step:.3g} mm")
        return new


@dataclass(frozen=True)
class PreparedCase:
    """Slices of one case, compressed, read one at a time.

    Attributes:
        name: Case identifier.
        images: Blosc2 array [Z, C, H, W], Hounsfield units (int16) or other intensities (float32), one chunk a slice.
        labels: Blosc2 array [Z, H, W] of label values (int16, or int32 where they need it), `IGNORED` where not counted; None
            for prediction.
        present: For each slice the label values in it, background and ignored left out.
        source: Geometry of the file.
        turn: From the file's axes to the slices'.
        source_plane: Rows and columns of a slice before resampling.
        spacing_mm: (z, y, x) of the prepared slices.
        content_hash: Of the image's voxels, whatever the file's format.
        modality: What its values mean: CT in HU; of another one they are in [0, 1].
    """

    name: str
    images: blosc2.NDArray
    labels: blosc2.NDArray | None
    present: tuple[frozenset[int], ...]
    source: Geometry
    turn: Turn
    source_plane: tuple[int, int]
    spacing_mm: tuple[float, float, float]
    content_hash: str
    modality: Modality = "ct"

    @property
    def num_slices(self) -> int:
        """Number of slices."""
        return int(self.images.shape[0])

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a prepared slice."""
        return int(self.images.shape[2]), int(self.images.shape[3])

    def image(self, z: int, neighbours: int = 0) -> Float[Tensor, "channels rows cols"]:
        """Return a slice, with neighbours as further channels from below to above; the ends repeat the last slice."""
        places = np.clip(np.arange(z - neighbours, z + neighbours + 1), 0, self.num_slices - 1)
        return torch.cat([torch.from_numpy(np.asarray(self.images[int(place)], dtype=np.float32)) for place in places])

    def label(self, z: int) -> NDArray[np.int32]:
        """Return the label values of a slice [H, W]."""
        if self.labels is None:
            raise ValueError(f"case {self.name} was prepared without labels")
        return np.asarray(self.labels[z], dtype=np.int32)

    def to_source(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Turn label values [Z, rows, cols] on the source's own pixels back to the file's axes."""
        return self.turn.undo(labels)


def prepare_case(
    dataset: LabelledDataset, case: LabelMapCase, channels: Sequence[int], rule: GridRule, with_label: bool = True
) -> PreparedCase:
    """Read a case and prepare its slices.

    Args:
        dataset: Reads the files.
        case: Which one.
        channels: Image channels to keep.
        rule: In-plane grid.
        with_label: Also read its label map.

    Raises:
        VolumeError: A file is unreadable, grids differ, or label values are unknown.
    """
    array, geometry = dataset.read_images(case, channels)
    label = dataset.read_label(case, geometry) if with_label else None
    return prepare_volume(case.name, array, geometry, rule, label, dataset.modality)


def prepare_volume(
    name: str,
    array: NDArray[Any],
    geometry: Geometry,
    rule: GridRule,
    label: NDArray[np.int32] | None = None,
    modality: Modality = "ct",
) -> PreparedCase:
    """Prepare a volume that has been read.

    Args:
        name: Case identifier.
        array: [C, Z, Y, X] in the file's axis order.
        geometry: Of the file.
        rule: In-plane grid.
        label: [Z, Y, X] label values, or None.
        modality: What its values mean; those of another one than CT are scaled to [0, 1] by their volume's range.

    Raises:
        VolumeError: Its axes are skewed or it holds values that are no numbers.
    """
    turn = turn_to_lps(geometry)
    spacing = turn.spacing_mm(geometry)
    stored = turn.apply(array).swapaxes(0, 1)  # [Z, C, rows, cols]
    images = _as_intensities(stored, name) if modality == "ct" else _as_unit(stored, name, modality)
    rows, cols = images.shape[2:]
    target = rule.target(rows, cols, (spacing[1], spacing[2]))
    resampled = np.stack([_resize(slice_, target) for slice_ in images])
    new_spacing = (spacing[0], spacing[1] * rows / target[0], spacing[2] * cols / target[1])
    labels, present = None, tuple(frozenset[int]() for _ in images)
    if label is not None:
        turned = turn.apply(label)
        values = turned[:, _nearest(rows, target[0])][:, :, _nearest(cols, target[1])]
        labels = _compressed(np.ascontiguousarray(values, dtype=np.int16 if values.max() <= MAX_NARROW_LABEL else np.int32))
        present = tuple(frozenset(np.unique(slice_).tolist()) - {0, IGNORED} for slice_ in values)
    return PreparedCase(
        name,
        _compressed(resampled),
        labels,
        present,
        geometry,
        turn,
        (rows, cols),
        new_spacing,
        content_hash(images if modality == "ct" else stored, modality),
        modality,
    )


def content_hash(images: NDArray[Any], modality: Modality = "ct") -> str:
    """Name a volume by its voxels, as `meddino-curate` does in volumes.parquet, whatever the file's format.

    Args:
        images: [Z, C, Y, X] in LPS order. The first channel counts, all three of a picture in colour; one whose three channels
            are alike was grey.
        modality: What its values mean.
    """
    colour = MEMBERS[modality].units == "brightness" and images.shape[1] == 3 and bool((images != images[:, :1]).any())
    return volume_hash((stored_slice(values, modality, colour) for values in images), len(images))


def stored_slice(values: NDArray[Any], modality: Modality, colour: bool) -> NDArray[Any]:
    """Return a slice as a corpus stores it, [Y, X] or [Y, X, 3].

    Args:
        values: [C, Y, X].
        modality: What its values mean; those of CT are kept as int16, others as they are.
        colour: Whether its three channels count; else the first one does.
    """
    if modality == "ct":
        whole: NDArray[np.int16] = np.clip(np.rint(values[0]), -32768, 32767).astype(np.int16)
        return whole
    stored = values.astype(stored_type(values.dtype))
    return np.moveaxis(stored, 0, -1) if colour else stored[0]


def _as_intensities(images: NDArray[Any], name: str) -> NDArray[Any]:
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise VolumeError(f"case {name}: the image holds values that are no numbers (NaN or infinite)")
    low, high = float(images.min()), float(images.max())
    # Hounsfield units lose nothing as whole numbers; intensities of another kind (0 to 1, say) would.
    if low >= -32768 and high <= 32767 and (high - low > 256 or np.issubdtype(images.dtype, np.integer)):
        return images if images.dtype == np.int16 else np.rint(images).astype(np.int16)
    return images.astype(np.float32)


def _as_unit(images: NDArray[Any], name: str, modality: Modality) -> NDArray[np.float32]:
    """Scale each channel by its own range, which is that of the whole volume."""
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise VolumeError(f"case {name}: the image holds values that are no numbers (NaN or infinite)")
    ends = np.array([value_range(modality, images[:, channel]) for channel in range(images.shape[1])], dtype=np.float32)
    low, span = ends[:, :1, None], np.maximum(ends[:, 1:, None] - ends[:, :1, None], np.float32(1e-12))
    unit: NDArray[np.float32] = np.clip((images.astype(np.float32) - low) / span, 0, 1)
    return unit


def _resize(image: NDArray[Any], target: tuple[int, int]) -> NDArray[Any]:
    if image.shape[1:] == target:
        return image
    shrinks = target[0] < image.shape[1] or target[1] < image.shape[2]
    tensor = torch.from_numpy(image.astype(np.float32))[None]
    # Voxel borders stay where they are (align_corners=False), so the inverse is exact about extents.
    resized = F.interpolate(tensor, size=target, mode="bilinear", align_corners=False, antialias=shrinks)[0].numpy()
    return np.rint(resized).astype(np.int16) if image.dtype == np.int16 else resized


def _nearest(size: int, target: int) -> NDArray[np.int64]:
    """Source index of each target pixel's centre."""
    return np.minimum(((np.arange(target) + 0.5) * size / target).astype(np.int64), size - 1)


def _compressed(array: NDArray[Any]) -> blosc2.NDArray:
    # One thread: the pool of several would fight with torch's.
    parameters = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    return blosc2.asarray(
        np.ascontiguousarray(array), chunks=(1, *array.shape[1:]), cparams=parameters, dparams={"nthreads": 1}
    )
