"""Whole volumes: slices through the sliding window, logits back on the source's pixels, label values in the source's axes."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.device import Machine
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow, pad_amounts
from meddino_evaluation.segmentation.networks.network import model_input

Forward = Callable[[Tensor], Tensor]


def predict_case(
    case: PreparedCase,
    forward: Forward,
    num_heads: int,
    contract: ImageContract,
    labels: LabelScheme,
    window: SlidingWindow,
    neighbours: int,
    machine: Machine,
) -> list[NDArray[np.int32]]:
    """Predict one volume with several heads at once, a few slices at a time.

    Args:
        case: Prepared slices.
        forward: Model input [B, C, H, W] to the logits of all heads, one after the other along the channels; what the
            encoder computes is shared by heads of the same frozen encoder.
        num_heads: How many heads that is.
        contract: The model's input contract.
        labels: Meaning of the outputs.
        window: Sliding window.
        neighbours: Neighbouring slices on either side that come in as channels.
        machine: Device and arithmetic.

    Returns:
        For each head label values [Z, Y, X] in the source's axes and on its voxels. Memory grows with the batch, not with
        the volume: only label values are kept.
    """
    rows, cols = case.source_plane
    (top, bottom), (left, right) = (pad_amounts(size, window.window_px) for size in case.plane)
    around = (left, right, top, bottom)
    inside = (..., slice(top, top + case.plane[0]), slice(left, left + case.plane[1]))
    volumes = [np.zeros((case.num_slices, rows, cols), dtype=np.int32) for _ in range(num_heads)]
    start = 0
    while start < case.num_slices:
        places = range(start, min(start + window.batch_size, case.num_slices))
        # Air around a slice that is smaller than a window, in intensities: what models make of it differs by channel.
        intensities = F.pad(torch.stack([case.image(z, neighbours) for z in places]), around, value=contract.window_hu[0])
        inputs = model_input(intensities, contract).to(machine.device)
        logits = window(inputs, forward, 0.0)[inside]
        if logits.shape[-2:] != (rows, cols):
            logits = F.interpolate(logits, size=(rows, cols), mode="bilinear", align_corners=False)
        for volume, own in zip(volumes, logits.chunk(num_heads, dim=1), strict=True):
            volume[places.start : places.stop] = decide(own, labels)
        start = places.stop
    return [case.to_source(volume) for volume in volumes]


def decide(logits: Tensor, labels: LabelScheme) -> NDArray[np.int32]:
    """Turn logits [B, K, H, W] into label values [B, H, W]: the largest class, or every region above one half."""
    if labels.has_regions:
        return labels.label_values((logits > 0).transpose(0, 1).cpu().numpy())
    return labels.label_values(logits.argmax(1).cpu().numpy())
