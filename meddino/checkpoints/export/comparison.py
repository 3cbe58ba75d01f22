"""Whether two models compute the same, and the slices on which that is looked at."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from meddino.checkpoints.export.model import Model
from meddino.core.errors import CheckpointError
from meddino.core.seeds import numpy_rng
from meddino.data.corpus import Corpus
from meddino.data.intensity import Modality
from meddino.data.model_input import to_unit
from meddino.models.registry import tapped_blocks

# Another library adds in another order; the same code does not. Relative to the largest output where that is above 1.
TOLERANCE_OTHER_LIBRARY = 2e-5
_THORAX_RANGE = torch.tensor([-1000.0, 500.0])


def all_tokens(model: Model, images: Tensor) -> Tensor:
    """Return CLS, register and patch tokens as one [B, tokens, D], the order of all libraries."""
    with torch.no_grad():
        features = model.forward_features(images)
        return torch.cat([features.cls_token[:, None], features.register_tokens, features.patch_tokens], dim=1)


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest absolute difference over pairs of tensors; NaN anywhere gives infinity.

    Raises:
        CheckpointError: If shapes differ.
    """
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise CheckpointError(f"outputs of different shapes: {list(one.shape)} and {list(other.shape)}")
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        largest = max(largest, float("inf") if math.isnan(difference) else difference)
    return largest


def outputs(model: Model, stored: Tensor) -> list[Tensor]:
    """Return what exports are compared on: CLS, registers, patch tokens, and the maps of four blocks."""
    images = model.preprocess(stored)
    with torch.no_grad():
        features = model.forward_features(images)
        taps = tapped_blocks(model.depth, min(4, model.depth))
        maps = model.backbone.get_intermediate_layers(images, taps)
        return [features.cls_token, features.register_tokens, features.patch_tokens, *maps]


def check_other_library(expected: Sequence[Tensor], found: Sequence[Tensor], library: str, what: str) -> None:
    """Refuse outputs of another library that differ from ours by more than rounding.

    Raises:
        CheckpointError: If they do.
    """
    difference = largest_difference(expected, found)
    scale = max([1.0, *(tensor.abs().max().item() for tensor in expected if tensor.numel())])
    if not difference <= TOLERANCE_OTHER_LIBRARY * scale:
        raise CheckpointError(
            f"loaded by {library}, the export does not compute what its source does: {what} differ by {difference:.2e} "
            f"(allowed: {TOLERANCE_OTHER_LIBRARY * scale:.0e}); nothing was written"
        )


def check_sizes(patch_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return two image sizes (rows, columns) in pixels that a model of this patch size takes, one of them not square."""
    return (8 * patch_size, 8 * patch_size), (6 * patch_size, 10 * patch_size)


def check_slices(patch_size: int, corpus: Path | str | None = None, modality: Modality = "ct") -> list[Float[Tensor, "2 h w"]]:
    """Return two slices at each of two sizes: in Hounsfield units, or in [0, 1] for another modality than CT.

    Args:
        patch_size: Of the model [px].
        corpus: Take the slices from there; None makes slices that look like a thorax.
        modality: Of the model.

    Raises:
        CheckpointError: If the corpus holds no slice.
    """
    sizes = check_sizes(patch_size)
    if corpus is None:
        made = [torch.stack([_thorax(rows, columns, number) for number in range(2)]) for rows, columns in sizes]
        return made if modality == "ct" else [to_unit(slices[:, None], _THORAX_RANGE)[:, 0] for slices in made]
    slices = Corpus(corpus)
    if not len(slices):
        raise CheckpointError(f"corpus {corpus} holds no slice to compare an export on")
    # Of another modality than the model's the values are as good: what is compared is arithmetic.
    chosen = [len(slices) // 3, 2 * len(slices) // 3]
    return [torch.stack([_resized(_grey(slices, index, modality), size) for index in chosen]) for size in sizes]


def _grey(corpus: Corpus, index: int, modality: Modality) -> Tensor:
    """Return a slice as a model of a modality takes it, colour as grey."""
    values = torch.from_numpy(corpus.read(index).astype(np.float32))
    grey = values if values.ndim == 2 else values.mean(-1)
    ends = torch.tensor(corpus.value_range(index) or _THORAX_RANGE.tolist())
    if modality == "ct" and corpus.modality(index) == modality:
        return grey
    unit = to_unit(grey[None], ends)[0]
    low, high = _THORAX_RANGE.tolist()
    return unit * (high - low) + low if modality == "ct" else unit


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    resized = torch.nn.functional.interpolate(values[None, None], size, mode="bilinear", antialias=True, align_corners=False)
    return resized[0, 0]


def _thorax(rows: int, columns: int, number: int) -> Tensor:
    # Air, a body, two lungs, a spine and noise: the range of values and the edges that a CT slice has.
    rng = numpy_rng(0, "check_slice", rows, columns, number)
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")

    def inside(centre_y: float, centre_x: float, height: float, width: float) -> np.ndarray:
        result: np.ndarray = ((y - centre_y) / height) ** 2 + ((x - centre_x) / width) ** 2 < 1
        return result

    values = np.full((rows, columns), -1000.0)
    values[inside(0, 0, 0.7, 0.9)] = 40.0
    for side in (-1, 1):
        values[inside(-0.05, 0.42 * side, 0.45, 0.28 + 0.03 * number)] = -820.0
    values[inside(0.5, 0, 0.14, 0.12)] = 420.0
    return torch.from_numpy((values + rng.normal(0, 20, values.shape)).round().astype(np.float32))
