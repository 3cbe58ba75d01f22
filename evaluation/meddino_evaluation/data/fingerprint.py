"""What preprocessing learns from the training cases alone: in-plane spacing and the intensities of the foreground."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from meddino.core.errors import VolumeError
from meddino.data.intensity import MEMBERS, CTIntensity, Intensity, Modality, read_intensity
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import turn_to_lps
from meddino_evaluation.data.prepare import PreparedCase

SAMPLES_PER_CASE = 10_000
"""Foreground intensities taken from a case, evenly over its voxels [nnU-Net: 10,000]."""


def median_plane_spacing(grids: Sequence[Geometry]) -> float:
    """Return the median in-plane spacing [mm] of the grids of some cases."""
    spacings = []
    for geometry in grids:
        spacings += list(turn_to_lps(geometry).spacing_mm(geometry)[1:])
    return float(np.median(spacings))


def foreground_contract(cases: Sequence[PreparedCase], channels: int, modality: Modality = "ct") -> Intensity:
    """Return the normalisation of the foreground as an input contract: of CT nnU-Net's (0.5 and 99.5 percentiles, z-score).

    Args:
        cases: Training cases.
        channels: How often the model wants one channel repeated.
        modality: Of the cases; of another one than CT, values in [0, 1] are only z-scored.

    Raises:
        VolumeError: No case has foreground.
    """
    found = []
    for case in cases:
        slices = [np.asarray(case.images[z])[0][case.label(z) > 0] for z in range(case.num_slices) if case.present[z]]
        values = np.concatenate(slices) if slices else np.empty(0)
        found.append(values[:: max(1, len(values) // SAMPLES_PER_CASE)].astype(np.float64))
    everything = np.concatenate(found)
    if len(everything) < 2:
        raise VolumeError("data.intensity=fingerprint needs labelled voxels, and the training cases have none")
    low, high = (float(value) for value in np.percentile(everything, (0.5, 99.5)))
    if high - low < 1e-6:
        raise VolumeError(f"data.intensity=fingerprint: all labelled voxels have the intensity {low:.4g}")
    mean, std = float(everything.mean()), max(float(everything.std()), 1e-8)
    if modality == "ct":
        return CTIntensity(hu_min=low, hu_max=high, mean=mean, std=std, channels=channels)
    if MEMBERS[modality].units == "brightness":
        scale: dict[str, Any] = {"mean": [mean] * channels, "std": [std] * channels}
    else:
        scale = {"mean": mean, "std": std, "channels": channels}
    return read_intensity({"modality": modality, **scale}, "the training cases' foreground")
