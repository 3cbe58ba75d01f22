"""Predicting and measuring one case with the networks of an experiment."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.metrics.label_metrics import LabelRow, score_case
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.inference.volumes import predict_case
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork


def predict(experiment: Experiment, case: PreparedCase, networks: Sequence[SegmentationNetwork]) -> list[NDArray[np.int32]]:
    """Predict one case with several networks of one encoder; a frozen encoder runs once for all of them.

    Returns:
        For each network label values [Z, Y, X] on the source's voxels.
    """
    first = networks[0]
    for network in networks:
        network.eval()

    def forward(images: Tensor) -> Tensor:
        with experiment.machine.autocast():
            if first.trains_encoder:
                return torch.cat([network(images).float() for network in networks], dim=1)
            maps = first.maps(images)
            return torch.cat([network.head(maps, images).float() for network in networks], dim=1)

    with torch.no_grad():
        return predict_case(
            case,
            forward,
            len(networks),
            first.contract,
            experiment.dataset.labels,
            experiment.window(),
            experiment.config.data.neighbour_slices,
            experiment.machine,
        )


def score(
    experiment: Experiment, case: PreparedCase, labels: NDArray[np.int32], reference: NDArray[np.int32], surface: bool
) -> list[LabelRow]:
    """Measure a prediction against the reference, both on the source's own voxels."""
    scheme, metrics = experiment.dataset.labels, experiment.config.metrics
    return score_case(case.name, labels, reference, scheme, case.source.spacing_mm, metrics.tolerance_mm, surface)
