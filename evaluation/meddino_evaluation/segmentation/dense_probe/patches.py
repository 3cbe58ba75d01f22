"""Patches of labelled slices: what a backbone says of each, what its pixels are, and which label lies on it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.device import Machine
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.data.labels import IGNORED, LabelScheme
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.segmentation.networks.network import model_input

PIXELS = "pixels"
"""Name of the features that need no network: the pixels of the patch themselves."""


@dataclass(frozen=True)
class PatchSet:
    """Patches of some slices.

    Attributes:
        features: [n, D] by name of the features: `blocks1`, `blocks4`, ..., and `pixels`.
        labels: [n] class indices, 0 is background; patches without a counted pixel are left out.
        patients: [n] number of the patient of each patch.
    """

    features: Mapping[str, Float[Tensor, "n _dim"]]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]

    def rows(self, chosen: NDArray[np.int64]) -> "PatchSet":
        """Return some of the patches."""
        index = torch.from_numpy(chosen)
        return PatchSet({name: f[index] for name, f in self.features.items()}, self.labels[chosen], self.patients[chosen])


def patch_labels(labels: NDArray[np.int32], patch_px: int, classes: int) -> NDArray[np.int64]:
    """Return the most frequent class of each patch; equally frequent ones: the higher number, which is rarely background.

    Args:
        labels: [Z, H, W] class indices, `IGNORED` where nothing counts; H and W are multiples of `patch_px`.
        patch_px: Side of a patch.
        classes: Number of classes, background among them.

    Returns:
        [Z, H / patch_px, W / patch_px]; `IGNORED` where no pixel counts.
    """
    z, height, width = labels.shape
    cells = labels.reshape(z, height // patch_px, patch_px, width // patch_px, patch_px)
    counts = np.stack([(cells == value).sum((2, 4)) for value in range(classes)])
    best = classes - 1 - counts[::-1].argmax(0)
    return np.where(counts.sum(0) > 0, best, IGNORED).astype(np.int64)


def encode_slices(
    case: PreparedCase,
    slices: Sequence[int],
    patient: int,
    scheme: LabelScheme,
    backbone: Backbone,
    blocks: Sequence[int],
    machine: Machine,
    batch_size: int,
) -> PatchSet:
    """Encode slices of a case, and read the labels beneath their patches.

    Slices are padded at the bottom and right to whole patches by the lower end of the model's window; padding never counts.

    Args:
        case: Prepared, with labels.
        slices: Which slices.
        patient: Number that stands for the patient.
        scheme: Meaning of the label values; plain classes.
        backbone: On the machine, in evaluation mode.
        blocks: Numbers of blocks that are read side by side.
        machine: Device and arithmetic.
        batch_size: Slices at once.
    """
    patch, contract = backbone.patch_size, replace(backbone.contract, given=case.modality)
    step = int(np.lcm(patch, contract.multiple_px))
    rows, cols = (-(-side // step) * step for side in case.plane)
    low, _ = contract.shown_range
    features: dict[str, list[Tensor]] = {name: [] for name in (*(f"blocks{count}" for count in blocks), PIXELS)}
    for start in range(0, len(slices), batch_size):
        images = torch.stack([case.image(z) for z in slices[start : start + batch_size]])
        padded = F.pad(images, (0, cols - images.shape[-1], 0, rows - images.shape[-2]), value=low)
        with torch.no_grad(), machine.autocast():
            for count, maps in _maps(backbone, model_input(padded.to(machine.device), contract), blocks):
                features[f"blocks{count}"].append(_rows(maps, rows // patch, cols // patch))
        features[PIXELS].append(_pixels(padded, contract, patch))
    labels = np.full((len(slices), rows, cols), IGNORED, dtype=np.int32)
    for place, z in enumerate(slices):
        labels[place, : case.plane[0], : case.plane[1]] = scheme.class_indices(case.label(z))
    found = patch_labels(labels, patch, scheme.num_outputs).reshape(-1)
    kept = np.flatnonzero(found != IGNORED)
    return PatchSet(
        {name: torch.cat(parts)[torch.from_numpy(kept)] for name, parts in features.items()},
        found[kept],
        np.full(len(kept), patient, dtype=np.int64),
    )


def join(parts: Sequence[PatchSet]) -> PatchSet:
    """Put patches of several cases together."""
    return PatchSet(
        {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.patients for part in parts]),
    )


def thinned(patches: PatchSet, per_label: int, rng: np.random.Generator) -> PatchSet:
    """Keep at most `per_label` patches of each label, drawn at random."""
    kept = [rng.permutation(np.flatnonzero(patches.labels == value))[:per_label] for value in np.unique(patches.labels)]
    return patches.rows(np.sort(np.concatenate(kept)))


def _maps(backbone: Backbone, images: Tensor, blocks: Sequence[int]) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield the maps of so many blocks each; the last block alone is the last map of several, and not computed again."""
    maps: Sequence[Tensor] = ()
    for count in sorted(blocks, reverse=True):
        maps = maps[-1:] if count == 1 and maps else backbone.patch_maps(images, count)
        yield count, maps


def _rows(maps: Sequence[Tensor], rows: int, cols: int) -> Float[Tensor, "n dim"]:
    # A convolutional network's stages have strides of their own: all are brought to the last one's cells.
    resized = [m.float() if m.shape[-2:] == (rows, cols) else F.adaptive_avg_pool2d(m.float(), (rows, cols)) for m in maps]
    return torch.cat(resized, 1).permute(0, 2, 3, 1).flatten(0, 2).cpu()


def _pixels(images: Float[Tensor, "b c h w"], contract: ImageContract, patch: int) -> Float[Tensor, "n dim"]:
    low, high = contract.shown_range
    unit = (images.clamp(low, high) - low) / (high - low)
    return F.unfold(unit, patch, stride=patch).transpose(1, 2).flatten(0, 1)
