"""Whole volumes: slices through the sliding window, logits back on the source's pixels, label values in the source's axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.device import Machine
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.metrics.label_metrics import LabelRow, score_case
from meddino_evaluation.segmentation.experiment import Experiment, sliding_window
from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow, pad_amounts
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork, model_input


@dataclass(frozen=True)
class Member:
    """Networks of one encoder that see a volume alike, e.g. the seeds of a fold.

    Attributes:
        networks: What a frozen encoder computes is shared by all of them.
        labels: Meaning of the outputs.
        window: Sliding window.
        neighbours: Neighbouring slices on either side that come in as channels.
        machine: Device and arithmetic.
    """

    networks: tuple[SegmentationNetwork, ...]
    labels: LabelScheme
    window: SlidingWindow
    neighbours: int
    machine: Machine

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of all networks, one after the other along the channels."""
        first = self.networks[0]
        with self.machine.autocast():
            if first.trains_encoder:
                return torch.cat([network(images).float() for network in self.networks], dim=1)
            maps = first.maps(images)
            return torch.cat([network.head(maps, images).float() for network in self.networks], dim=1)

    @torch.no_grad()
    def logits(self, case: PreparedCase, places: range) -> tuple[Tensor, ...]:
        """Return for each network logits [B, K, rows, cols] of some slices, on the source's pixels."""
        contract = self.networks[0].contract
        (top, bottom), (left, right) = (pad_amounts(size, self.window.window_px) for size in case.plane)
        # Air around a slice that is smaller than a window, in intensities: what models make of it differs by channel.
        slices = torch.stack([case.image(z, self.neighbours) for z in places])
        inputs = model_input(F.pad(slices, (left, right, top, bottom), value=contract.shown_range[0]), contract)
        logits = self.window(inputs.to(self.machine.device), self.forward, 0.0)
        logits = logits[..., top : top + case.plane[0], left : left + case.plane[1]]
        if logits.shape[-2:] != case.source_plane:
            logits = F.interpolate(logits, size=case.source_plane, mode="bilinear", align_corners=False)
        return logits.chunk(len(self.networks), dim=1)


def predict_each(member: Member, case: PreparedCase) -> list[NDArray[np.int32]]:
    """Predict one volume with each network, a few slices at a time.

    Returns:
        For each network label values [Z, Y, X] in the source's axes and on its voxels. Memory grows with the batch, not with
        the volume: only label values are kept.
    """
    volumes = [np.zeros((case.num_slices, *case.source_plane), dtype=np.int32) for _ in member.networks]
    start = 0
    while start < case.num_slices:
        places = range(start, min(start + member.window.batch_size, case.num_slices))
        for volume, own in zip(volumes, member.logits(case, places), strict=True):
            volume[places.start : places.stop] = decide(own, member.labels)
        start = places.stop
    return [case.to_source(volume) for volume in volumes]


def predict_together(members: Sequence[Member], cases: Sequence[PreparedCase]) -> NDArray[np.int32]:
    """Predict one volume with the mean of all networks' probabilities; one network alone decides as in `predict_each`.

    Args:
        members: Of one data set's labels.
        cases: The volume, prepared for each member (in-plane grids may differ from fold to fold).

    Returns:
        Label values [Z, Y, X] in the source's axes and on its voxels.
    """
    if len(members) == 1 and len(members[0].networks) == 1:
        return predict_each(members[0], cases[0])[0]
    first, labels, start = cases[0], members[0].labels, 0
    volume = np.zeros((first.num_slices, *first.source_plane), dtype=np.int32)
    while start < first.num_slices:
        size = min(member.window.batch_size for member in members)
        places = range(start, min(start + size, first.num_slices))
        every = [one for member, case in zip(members, cases, strict=True) for one in member.logits(case, places)]
        unit = [one.sigmoid() if labels.has_regions else one.softmax(1) for one in every]
        # Regions are decided at a logit of 0: a mean probability of one half.
        mean = torch.stack(unit).mean(0)
        volume[places.start : places.stop] = decide(mean - 0.5 if labels.has_regions else mean, labels)
        start = places.stop
    return first.to_source(volume)


def decide(logits: Tensor, labels: LabelScheme) -> NDArray[np.int32]:
    """Turn logits [B, K, H, W] into label values [B, H, W]: the largest class, or every region above one half."""
    if labels.has_regions:
        return labels.label_values((logits > 0).transpose(0, 1).cpu().numpy())
    return labels.label_values(logits.argmax(1).cpu().numpy())


def predict(experiment: Experiment, case: PreparedCase, networks: Sequence[SegmentationNetwork]) -> list[NDArray[np.int32]]:
    """Predict one case with several networks of one encoder; see `predict_each`."""
    for network in networks:
        network.eval()
    window, config = sliding_window(experiment.config), experiment.config.data
    labels, machine = experiment.dataset.labels, experiment.machine
    return predict_each(Member(tuple(networks), labels, window, config.neighbour_slices, machine), case)


def score(
    experiment: Experiment, case: PreparedCase, labels: NDArray[np.int32], reference: NDArray[np.int32], surface: bool
) -> list[LabelRow]:
    """Measure a prediction against the reference, both on the source's own voxels."""
    dataset, metrics = experiment.dataset, experiment.config.metrics
    spacing, tolerance = case.source.spacing_mm, metrics.tolerance_mm
    return score_case(case.name, labels, reference, dataset.labels, spacing, tolerance, surface, dataset.flat)
