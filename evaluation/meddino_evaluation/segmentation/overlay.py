"""Pictures of a slice: reference on the left, prediction on the right, labels in colour over the soft-tissue window."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from meddino.core.html_charts import beside
from meddino.data.intensity import MEMBERS
from meddino.data.model_input import to_picture
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.prepare import PreparedCase

COLOURS = np.array(
    [
        [230, 85, 60],
        [70, 160, 240],
        [90, 200, 110],
        [240, 190, 50],
        [170, 110, 220],
        [60, 200, 200],
        [240, 120, 180],
        [160, 200, 60],
    ],
    dtype=np.float64,
)
"""Told apart by people with the usual colour blindness better than pure hues; they repeat after the eighth label."""

OPACITY = 0.45
WIDTH_PX = 320


def overlay_png(case: PreparedCase, prediction: NDArray[np.int32], reference: NDArray[np.int32], labels: LabelScheme) -> bytes:
    """Draw the slice with the most labelled voxels.

    Args:
        case: Prepared case, for the image.
        prediction: [Z, Y, X] label values in the source's axes.
        reference: As `prediction`.
        labels: Names and values.

    Returns:
        PNG bytes: two panels of `WIDTH_PX` pixels.
    """
    pred, ref = case.turn.apply(prediction), case.turn.apply(reference)
    z = _fullest(ref, pred)
    grey = _sized_grey(case, z)
    return beside([_coloured(grey, values[z], labels) for values in (ref, pred)])


def mask_overlay_png(case: PreparedCase, prediction: NDArray[np.int32], labels: LabelScheme) -> bytes:
    """Draw the slice with the most predicted voxels, without and with the prediction: PNG bytes of two panels."""
    pred = case.turn.apply(prediction)
    z = _fullest(pred)
    grey = _sized_grey(case, z)
    return beside([_coloured(grey, values, labels) for values in (np.zeros_like(pred[z]), pred[z])])


def _fullest(*volumes: NDArray[np.int32]) -> int:
    """Return the slice with the most labelled voxels of the first volume that has any; the middle one if none has."""
    for volume in volumes:
        area = (volume > 0).sum(axis=(1, 2))
        if area.any():
            return int(area.argmax())
    return len(volumes[0]) // 2


def _sized_grey(case: PreparedCase, z: int) -> NDArray[np.uint8]:
    rows, cols = case.plane
    height = max(1, round(WIDTH_PX * rows * case.spacing_mm[1] / (cols * case.spacing_mm[2])))
    return np.asarray(_grey(case, z).resize((WIDTH_PX, height), Image.Resampling.BILINEAR))


def label_colours(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the colour of each label in pictures, in the order of the labels."""
    return {name: tuple(COLOURS[place % len(COLOURS)].tolist()) for place, name in enumerate(names)}


def _grey(case: PreparedCase, z: int) -> Image.Image:
    image = case.image(z).mean(0) if MEMBERS[case.modality].units == "brightness" else case.image(z)[0]
    if case.images.dtype == np.int16:
        return Image.fromarray(to_picture(image, "ct").numpy())
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], torch.tensor([0.01, 0.99])).tolist()
    return Image.fromarray(to_picture(image, "ct", window=((low + high) / 2, max(high - low, 1e-6))).numpy())


def _coloured(grey: NDArray[np.uint8], values: NDArray[np.int32], labels: LabelScheme) -> NDArray[np.uint8]:
    height, width = grey.shape
    rows = np.arange(height) * values.shape[0] // height
    cols = np.arange(width) * values.shape[1] // width
    shown = values[rows][:, cols]
    picture = np.repeat(grey[..., None].astype(np.float64), 3, axis=2)
    for target in range(len(labels.names)):
        mask = labels.mask(shown, target)
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * COLOURS[target % len(COLOURS)]
    return np.rint(picture).astype(np.uint8)
