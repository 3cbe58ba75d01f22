"""Which masks are prompted for, and a whole case from its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino_evaluation.data.labels import IGNORED, LabelScheme
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.prompts.config import PromptsConfig
from meddino_evaluation.prompts.drawing import Prompt, box_of, moved_out, points_in
from meddino_evaluation.prompts.network import PromptNetwork
from meddino_evaluation.segmentation.networks.network import model_input
from meddino_evaluation.segmentation.training.map_cache import CropKey, MapCache

FULL_PX = 1024
"""Size of the picture in whose pixels the margin of boxes is given."""


@dataclass(frozen=True)
class Target:
    """A mask that is prompted for: number of its case, of the slice in it, and of the label."""

    case: int
    z: int
    label: int


def targets_of(cases: Sequence[PreparedCase], scheme: LabelScheme) -> list[Target]:
    """Return every label of every slice that holds it.

    Raises:
        ConfigError: No slice holds a label.
    """
    found = [
        Target(number, z, label)
        for number, case in enumerate(cases)
        for z in range(case.num_slices)
        for label, values in enumerate(scheme.values)
        if case.present[z] & set(values)
    ]
    if not found:
        raise ConfigError(f"none of the {len(cases)} training cases holds a label: {', '.join(scheme.names)}")
    return found


def drawn_prompt(mask: NDArray[np.bool_], config: PromptsConfig, size_px: int, *position: int | str) -> Prompt:
    """Draw what a user would for a mask [H, W] in the pixels of the encoder's picture; the position seeds it."""
    rng = numpy_rng(config.seed, "prompt", *position)
    margin = round(config.box_margin_px * size_px / FULL_PX)
    box = moved_out(box_of(mask), margin, (mask.shape[0], mask.shape[1]), rng) if config.kind != "point" else None
    return Prompt(box, points_in(mask, config.points, rng) if config.kind != "box" else ())


def squared(planes: Tensor, size_px: int, value: float) -> Tensor:
    """Pad pictures [..., H, W] at the bottom and right to a square."""
    return F.pad(planes, (0, size_px - planes.shape[-1], 0, size_px - planes.shape[-2]), value=value)


def encoded(network: PromptNetwork, cache: MapCache, case: PreparedCase, z: int, neighbours: int) -> Tensor:
    """Return the held encoder's map [1, C, h, w] of a slice."""
    image = squared(case.image(z, neighbours), network.size_px, network.contract.shown_range[0])
    inputs = model_input(image[None], network.contract).to(cache.machine.device)
    return cache.maps(inputs, [CropKey(case.name, z, 0, 0)])[0]


def predict_prompts(
    network: PromptNetwork, maps: Tensor, prompts: Sequence[Prompt], plane: tuple[int, int], source_plane: tuple[int, int]
) -> Tensor:
    """Return logits [n, rows, cols] of several prompts on one slice, on the source's pixels."""
    with torch.no_grad():
        logits = torch.cat([network(maps, [one]) for one in prompts])[:, : plane[0], : plane[1]]
    if (plane[0], plane[1]) != source_plane:
        logits = F.interpolate(logits[None], size=source_plane, mode="bilinear", align_corners=False)[0]
    return logits


def predict_case(
    network: PromptNetwork,
    cache: MapCache,
    case: PreparedCase,
    scheme: LabelScheme,
    config: PromptsConfig,
    neighbours: int,
) -> NDArray[np.int32]:
    """Predict a case from prompts on every slice and label of its reference.

    Returns:
        Label values [Z, Y, X] in the source's axes. Where masks of two labels meet, the larger logit has the pixel. A slice
        without a label has no prompt: nothing is found there.
    """
    volume = np.zeros((case.num_slices, *case.source_plane), dtype=np.int32)
    for z in range(case.num_slices):
        labels = [label for label, values in enumerate(scheme.values) if case.present[z] & set(values)]
        if not labels:
            continue
        drawn = [
            drawn_prompt(scheme.mask(case.label(z), label), config, network.size_px, case.name, z, scheme.names[label])
            for label in labels
        ]
        logits = predict_prompts(network, encoded(network, cache, case, z, neighbours), drawn, case.plane, case.source_plane)
        best, place = logits.cpu().max(0)
        values = np.array([scheme.values[label][0] for label in labels], dtype=np.int32)[place.numpy()]
        volume[z] = np.where(best.numpy() > 0, values, 0)
    return case.to_source(volume)


def training_mask(case: PreparedCase, target: Target, scheme: LabelScheme) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the mask of a target and where it counts, both [H, W]."""
    labels = case.label(target.z)
    return scheme.mask(labels, target.label), labels != IGNORED
