"""Tokens of a whole volume with the place of each in the patient, and arrays of all kinds as model input."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.errors import ConfigError, VolumeError
from meddino.data.intensity import OF_DICOM_CODE, Intensity
from meddino.data.model_input import check_modality, is_foreground, normalise
from meddino.data.stored_values import value_range
from meddino.models.backbone import Backbone
from meddino.models.patch_maps import share_of_patch
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import to_axial_lps, turn_to_lps
from meddino.volumes.volume import AxialVolume, Volume

_TILT_TOLD_DEG = 1.0


@dataclass(frozen=True, repr=False)
class VolumeTokens:
    """Patch tokens of every slice of a volume.

    Attributes:
        tokens: [Z, h, w, D], after the last norm. Slices run from the feet up, rows to the back, columns to the left.
        cls_tokens: [Z, D], one a slice; the mean over patches where the network has no CLS token.
        body: [Z, h, w], True where at least half of the patch is denser than air (CT) or brighter than dark.
        geometry: The grid of the tokens: a "voxel" of it is a patch.
        notes: What was decided on the way: how the volume was turned, resized, padded.
    """

    tokens: Float[Tensor, "z h w dim"]
    cls_tokens: Float[Tensor, "z dim"]
    body: Bool[Tensor, "z h w"]
    geometry: Geometry
    notes: tuple[str, ...]

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4: from (slice, row, column, 1) of a token to the position of its centre [mm], LPS, as `Volume.affine`."""
        return self.geometry.affine

    def __repr__(self) -> str:
        spacing = " x ".join(f"{value:.4g}" for value in self.geometry.spacing_mm)
        notes = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"VolumeTokens(tokens {list(self.tokens.shape)}, cls_tokens {list(self.cls_tokens.shape)}, "
            f"body {int(self.body.sum())} of {self.body.numel()} patches, {spacing} mm){notes}"
        )


def as_stored(values: Any, contract: Intensity, given_range: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return grey values as a tensor [..., H, W], and what becomes 0 and 1 of them (None for CT, or if they are in [0, 1]).

    Args:
        values: A tensor, anything NumPy takes, or a `Volume`, whose slices are turned to axial ones and which brings its range.
        contract: The model's input contract.
        given_range: For values in other units than the contract's: what becomes 0 and 1.

    Raises:
        ConfigError: The values cannot be what the contract says.
    """
    if isinstance(values, Volume):
        axial, _ = turned(values, contract)
        stored = torch.from_numpy(np.stack([np.asarray(axial.planes[z], dtype=np.float32) for z in range(len(axial.planes))]))
        return stored, _range_of(values, contract) if given_range is None else torch.as_tensor(given_range)
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        # torch takes neither every byte order nor every step of NumPy's.
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if values.ndim < 2:
        raise ConfigError(f"grey values of shape {list(values.shape)}; give [H, W] or [..., H, W]")
    if contract.modality != "ct" and given_range is None and values.numel():
        low, high = float(values.min()), float(values.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ConfigError(
                f"values go from {low:g} to {high:g}; a model of {contract.modality} takes values in [0, 1], or value_range "
                "(meddino.data.stored_values.value_range of the whole volume), or a Volume, which brings its own"
            )
    return values, None if given_range is None else torch.as_tensor(given_range)


def turned(volume: Volume, contract: Intensity) -> tuple[AxialVolume, float]:
    """Return a volume's axial slices, axes permuted and flipped to the nearest ones, and how far [degrees] they lie askew.

    Raises:
        ConfigError: Its file says that it is of another modality than the model's.
        VolumeError: It holds values that are no numbers.
    """
    said = OF_DICOM_CODE.get(volume.modality)
    if said is not None and (mismatch := check_modality(contract.modality, said, "volume")):
        raise ConfigError(mismatch)
    if volume.voxels.dtype.kind not in "iufb":
        raise VolumeError(f"volume holds values of type {volume.voxels.dtype}; grey values are real numbers")
    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels).all():
        raise VolumeError("volume holds values that are no numbers (NaN or infinite)")
    return to_axial_lps(volume, max_tilt_deg=180.0)


def padded(images: Float[Tensor, "*batch c h w"], contract: Intensity, multiple: int) -> tuple[Tensor, str]:
    """Pad model input at the bottom and the right with the contract's lowest value, to sides that are multiples.

    Returns:
        The images, and what was done in words ("" for nothing).
    """
    rows, columns = images.shape[-2:]
    down, right = -rows % multiple, -columns % multiple
    if not down and not right:
        return images, ""
    low = contract.shown_range[0]
    blank = normalise(torch.full((1, 1), low, device=images.device), contract)
    larger = blank.to(images.dtype).expand(*images.shape[:-2], rows + down, columns + right).clone()
    larger[..., :rows, :columns] = images
    value = f"{low:g} HU" if contract.modality == "ct" else "black"
    return larger, (
        f"padded from {rows} x {columns} to {rows + down} x {columns + right} px with {value} at the bottom and right: "
        f"sides are multiples of {multiple}"
    )


def encode(backbone: Backbone, contract: Intensity, volume: Volume, batch: int = 8, size_px: int | None = None) -> VolumeTokens:
    """Compute the tokens of all slices; see `Model.encode_volume`."""
    if batch < 1:
        raise ConfigError(f"batch is {batch}; at least 1 slice at a time")
    (axial, tilt_deg), limits = turned(volume, contract), _range_of(volume, contract)
    rows, columns = axial.planes.shape[1:]
    factor = 1.0 if size_px is None else size_px / max(rows, columns)
    size = max(1, round(rows * factor)), max(1, round(columns * factor))
    notes = [*axial.notes, *_told(volume, contract, tilt_deg)]
    if size != (rows, columns):
        notes.append(f"slices were resized from {rows} x {columns} to {size[0]} x {size[1]} px")
    multiple, device = math.lcm(backbone.multiple_px, backbone.patch_size), next(backbone.parameters()).device
    tokens, cls_tokens, body, note = [], [], [], ""
    for stored in _batches(axial, batch, size):
        images, note = padded(normalise(stored, contract, limits), contract, multiple)
        seen = is_foreground(stored, contract.modality, limits)
        seen = F.pad(seen, (0, images.shape[-1] - size[1], 0, images.shape[-2] - size[0]))
        output = backbone.tokens(images.to(device))
        tokens.append(output.patch_map.movedim(1, -1).float().cpu())
        cls_tokens.append(output.cls_token.float().cpu())
        body.append(share_of_patch(seen, backbone.patch_size) >= 0.5)
    steps = (backbone.patch_size * rows / size[0], backbone.patch_size * columns / size[1])
    all_tokens = torch.cat(tokens)
    z, h, w = all_tokens.shape[:3]
    grid = _token_grid(axial.geometry, (z, h, w), steps)
    return VolumeTokens(all_tokens, torch.cat(cls_tokens), torch.cat(body), grid, (*notes, *([note] if note else [])))


def _batches(axial: AxialVolume, batch: int, size: tuple[int, int]) -> Iterator[Shaped[Tensor, "b h w"]]:
    for start in range(0, len(axial.planes), batch):
        planes = [axial.planes[z] for z in range(start, min(start + batch, len(axial.planes)))]
        stored = torch.from_numpy(np.stack([np.asarray(plane, dtype=np.float32) for plane in planes]))
        if size != stored.shape[1:]:
            shrinks = size[0] < stored.shape[1]
            # Voxel borders stay where they are, which the grid of the tokens relies on.
            stored = F.interpolate(stored[:, None], size=size, mode="bilinear", align_corners=False, antialias=shrinks)[:, 0]
        yield stored


def _token_grid(voxels: Geometry, shape: tuple[int, int, int], steps: tuple[float, float]) -> Geometry:
    """Return where patches of `steps` voxels [rows, columns] lie; the first begins at the border of the first voxel."""
    z_mm, y_mm, x_mm = voxels.spacing_mm
    origin = np.asarray(voxels.origin_mm, dtype=np.float64)
    for axis, (step, spacing) in enumerate(zip(steps, (y_mm, x_mm), strict=True), start=1):
        origin = origin + voxels.axes[axis] * spacing * (step - 1) / 2
    x, y, z = origin.tolist()
    return Geometry(shape, (z_mm, y_mm * steps[0], x_mm * steps[1]), (x, y, z), voxels.axes)


def _range_of(volume: Volume, contract: Intensity) -> Tensor | None:
    return None if contract.modality == "ct" else torch.tensor(value_range(contract.modality, volume.voxels))


def _told(volume: Volume, contract: Intensity, tilt_deg: float) -> list[str]:
    turn, notes = turn_to_lps(volume.geometry), []
    if turn.order != (0, 1, 2) or any(turn.flips):
        notes.append("axes were permuted or flipped to the nearest of Superior, Posterior, Left")
    if tilt_deg > _TILT_TOLD_DEG:
        notes.append(f"the volume lies {tilt_deg:.1f} degrees askew: slices are the stored ones, not resampled upright")
    notes += [f"the grid does not say where every voxel lies: {volume.irregular}"] if volume.irregular else []
    if volume.places_mm is not None:
        notes.append("slices are uneven: the affine has their median distance")
    if contract.modality == "ct" and volume.modality != "CT" and volume.voxels.size and float(volume.voxels.min()) >= 0:
        notes.append("taken for CT, though no value lies below 0 and air is -1000 HU: is it in Hounsfield units?")
    return notes
