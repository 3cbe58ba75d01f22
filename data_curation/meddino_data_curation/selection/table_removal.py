"""The table and whatever else lies beside the body, set to air."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddino_data_curation.selection.slice_choice import AIR_HU

_MARGIN_SHARE = 1 / 128  # of the longer side: the body is looked for on a coarse grid, and no skin may be lost


def without_table(hu: NDArray[np.int16], body: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Return a slice in which everything farther from the body than a narrow margin is air.

    Args:
        hu: int16 [rows, cols].
        body: bool [rows, cols], from `slice_choice.body_mask`.
    """
    margin = max(2, round(max(hu.shape) * _MARGIN_SHARE))
    near = ndimage.binary_dilation(body, iterations=margin)
    kept: NDArray[np.int16] = np.where(near, hu, np.int16(AIR_HU))
    return kept
