"""Distances between the surfaces of two masks, in millimetres with the true spacing; of pictures, between their outlines.

Two definitions of a surface are in use, and both are here because published numbers hang on them:
HD95 and ASSD take the voxels of a mask that touch its outside by a face, each counted once (MONAI, medpy);
the normalised surface Dice takes the marching-cubes surface between voxels, each piece weighted by its area
(DeepMind's surface-distance, MONAI with `use_subvoxels`), because at a tolerance of a voxel the first would be coarse.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]
Points = NDArray[np.float64]


def border_distances(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance of every border voxel of one mask to the nearest border voxel of the other.

    Args:
        pred: [Z, Y, X] or [Y, X], not empty.
        ref: Reference, of pred's shape.
        spacing_mm: Along each axis.

    Returns:
        From pred to ref and from ref to pred, millimetres.
    """
    first, second = border(pred), border(ref)
    return _both_ways(first, second, spacing_mm)


def hd95_mm(to_ref: NDArray[np.float64], to_pred: NDArray[np.float64]) -> float:
    """95th percentile of the Hausdorff distance [mm]: the larger of the two directed percentiles (MONAI).

    Args:
        to_ref: [n], distances of `border_distances` in mm.
        to_pred: [m], the other way.
    """
    return float(max(np.percentile(to_ref, 95), np.percentile(to_pred, 95)))


def assd_mm(to_ref: NDArray[np.float64], to_pred: NDArray[np.float64]) -> float:
    """Average symmetric surface distance [mm]: the mean over the border voxels of both masks together (MONAI).

    Args:
        to_ref: [n], distances of `border_distances` in mm.
        to_pred: [m], the other way.
    """
    return float((to_ref.sum() + to_pred.sum()) / (len(to_ref) + len(to_pred)))


def surface_dice(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...], tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces that lies within a tolerance of the other.

    Args:
        pred: [Z, Y, X] or [Y, X], not empty.
        ref: Reference, of pred's shape.
        spacing_mm: Along each axis.
        tolerance_mm: A distance equal to it is within.

    Source: Nikolov et al. 2018 (arXiv 1809.04430), surfaces and areas as in DeepMind's surface-distance.
    """
    areas = _areas(spacing_mm)
    codes = _cube_codes(pred), _cube_codes(ref)
    full = 2 ** (2**pred.ndim) - 1
    edges = tuple((code != 0) & (code != full) for code in codes)
    own = tuple(areas[code[edge]] for code, edge in zip(codes, edges, strict=True))
    # Whether it is within is all that is asked, so nothing is searched for far beyond the tolerance.
    distances = _both_ways(edges[0], edges[1], spacing_mm, bound_mm=tolerance_mm * (1 + 1e-9))
    within = sum(float(area[distance <= tolerance_mm].sum()) for area, distance in zip(own, distances, strict=True))
    total = sum(float(area.sum()) for area in own)
    return within / total if total else math.nan


def border(mask: Mask) -> Mask:
    """Return the voxels of a mask with a face neighbour outside it; beyond the array is outside."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for shift in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(shift, shift + mask.shape[axis])
            inner &= padded[tuple(window)]
    return mask & ~inner


def _both_ways(first: Mask, second: Mask, spacing_mm: tuple[float, ...], bound_mm: float = math.inf) -> tuple[Points, Points]:
    """Distance of every voxel of each mask to the nearest of the other; infinite where none is nearer than the bound."""
    scale = np.asarray(spacing_mm)
    points = np.argwhere(first) * scale, np.argwhere(second) * scale
    # A voxel on both surfaces is at distance 0: the better the prediction, the less is left to search.
    shared = first & second
    on_both = shared[first], shared[second]
    results = []
    for own, common, other in ((points[0], on_both[0], points[1]), (points[1], on_both[1], points[0])):
        distances = np.zeros(len(own))
        if not common.all():
            distances[~common] = cKDTree(other, leafsize=32, balanced_tree=False).query(
                own[~common], distance_upper_bound=bound_mm
            )[0]
        results.append(distances)
    return results[0], results[1]


def _cube_codes(mask: Mask) -> NDArray[np.uint8]:
    """Number each cube of 2 x 2 x 2 voxels (square of 2 x 2 pixels) by which are in the mask; bits as in surface-distance."""
    padded = np.pad(mask, 1).view(np.uint8)
    sizes = tuple(size - 1 for size in padded.shape)
    code = np.zeros(sizes, dtype=np.uint8)
    last = 2**mask.ndim - 1
    for bit, starts in enumerate(np.ndindex(*(2,) * mask.ndim)):
        window = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        code |= padded[window] << np.uint8(last - bit)
    return code


@lru_cache(maxsize=64)
def _areas(spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    # The tables of surface pieces are MONAI's (from surface-distance); importing it takes seconds, so only here.
    from monai.metrics.utils import (
        create_table_neighbour_code_to_contour_length,
        create_table_neighbour_code_to_surface_area,
    )

    create = (
        create_table_neighbour_code_to_surface_area if len(spacing_mm) == 3 else create_table_neighbour_code_to_contour_length
    )
    table: NDArray[np.float64] = np.asarray(create(spacing_mm)[0], dtype=np.float64)
    return table
