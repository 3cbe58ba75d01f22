"""Post-processing of label maps: the largest component of a label, where validation says that it helps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddino_evaluation.data.labels import LabelScheme

_ALL_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


def keep_largest(labels: NDArray[np.int32], scheme: LabelScheme, names: Sequence[str]) -> NDArray[np.int32]:
    """Set to background what is not in the largest component of a label (26 neighbours; the first of equal ones).

    Args:
        labels: [Z, Y, X] label values of a scheme without regions.
        scheme: Names and values.
        names: Labels to which it is applied.
    """
    cleaned = labels.copy()
    for target, name in enumerate(scheme.names):
        if name not in names:
            continue
        mask = scheme.mask(labels, target)
        components, count = ndimage.label(mask, structure=_ALL_NEIGHBOURS)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            cleaned[mask & (components != sizes.argmax())] = 0
    return cleaned


def labels_it_helps(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> tuple[str, ...]:
    """Return the labels whose mean Dice over the validation cases it raises.

    Args:
        before: For each case, Dice by label; NaN where undefined.
        after: The same with the largest components only.
    """
    helped = []
    for name in before[0] if before else ():
        gains = [b[name] - a[name] for a, b in zip(before, after, strict=True)]
        defined = [gain for gain in gains if not np.isnan(gain)]
        if defined and float(np.mean(defined)) > 0:
            helped.append(name)
    return tuple(helped)
