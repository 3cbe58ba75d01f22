"""Turning volumes whose slices are uneven: every voxel keeps its place, resampled or not."""

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import AXIAL_LPS, to_axial_lps
from meddino.volumes.volume import Volume

PLACES = (0.0, 3.0, 6.0, 9.0, 30.0, 33.0, 34.5, 39.0)
SHAPE, SPACING = (len(PLACES), 14, 12), (3.0, 2.0, 2.5)


def tilted(axes: np.ndarray, degrees: float) -> np.ndarray:
    return Rotation.from_euler("x", degrees, degrees=True).apply(axes)


def volume_on(axes: np.ndarray, values: np.ndarray) -> Volume:
    return Volume(values, Geometry(SHAPE, SPACING, (-10.0, 20.0, 30.0), axes), PLACES)


def places_of(volume: Volume) -> np.ndarray:
    """Patient position of every voxel [Z, Y, X, 3], from the true places of the slices."""
    z, y, x = np.meshgrid(PLACES, SPACING[1] * np.arange(SHAPE[1]), SPACING[2] * np.arange(SHAPE[2]), indexing="ij")
    return np.asarray(volume.geometry.origin_mm) + np.stack([z, y, x], axis=-1) @ volume.geometry.axes


def positions_of(geometry: Geometry) -> np.ndarray:
    z, y, x = (np.arange(size) * step for size, step in zip(geometry.shape, geometry.spacing_mm, strict=True))
    grid = np.stack(np.meshgrid(z, y, x, indexing="ij"), axis=-1)
    return np.asarray(geometry.origin_mm) + grid @ geometry.axes


@pytest.mark.parametrize("axes", [AXIAL_LPS, AXIAL_LPS * [[-1], [1], [-1]], AXIAL_LPS[[2, 0, 1]], -AXIAL_LPS[[1, 2, 0]]])
def test_oblique_and_uneven__is_resampled_from_where_the_slices_lie(axes):
    values = np.random.default_rng(0).normal(size=SHAPE)
    volume = volume_on(tilted(axes, 40), values)
    upright, tilt_deg = to_axial_lps(volume, 35.0, outside=-9)
    assert tilt_deg == pytest.approx(40)
    assert upright.places_mm is None
    assert upright.notes == ("oblique: resampled upright, interpolated over up to 21.0 mm between slices",)
    wanted = positions_of(upright.geometry)
    block = (np.array(PLACES), SPACING[1] * np.arange(SHAPE[1]), SPACING[2] * np.arange(SHAPE[2]))
    interpolated = RegularGridInterpolator(block, values, bounds_error=False, fill_value=-9)
    expected = interpolated((wanted - volume.geometry.origin_mm) @ volume.geometry.axes.T)
    found = np.stack([upright.planes[z] for z in range(len(upright.planes))])
    at_the_edge = np.isclose(found, -9) != np.isclose(expected, -9)  # rounding decides on which side a border lies
    assert at_the_edge.mean() < 0.01
    assert (expected[~at_the_edge] != -9).sum() > 500
    np.testing.assert_allclose(found[~at_the_edge], expected[~at_the_edge], atol=1e-9)
    voxels = places_of(volume).reshape(-1, 3)
    low, high = wanted.reshape(-1, 3).min(axis=0), wanted.reshape(-1, 3).max(axis=0)
    spacing = np.array(upright.geometry.spacing_mm)[::-1]
    assert (voxels >= low - 1e-9).all()
    assert (voxels <= high + spacing).all()


def test_oblique_and_even__is_what_it_was_without_places():
    values = np.random.default_rng(1).integers(-1000, 1000, SHAPE).astype(np.int16)
    geometry = Geometry(SHAPE, SPACING, (0.0, 0.0, 0.0), tilted(AXIAL_LPS, 40))
    without, _ = to_axial_lps(Volume(values, geometry), 35.0)
    with_places, _ = to_axial_lps(Volume(values, geometry, tuple(3.0 * z for z in range(SHAPE[0]))), 35.0)
    assert without.geometry.matches(with_places.geometry)
    differs = [(without.planes[z] != with_places.planes[z]).mean() for z in range(len(without.planes))]
    assert np.mean(differs) < 0.001


def test_upright_and_uneven__turned_over_keeps_its_first_slice_where_it_lay():
    volume = volume_on(AXIAL_LPS * [[-1], [1], [1]], np.arange(np.prod(SHAPE)).reshape(SHAPE))
    upright, _ = to_axial_lps(volume, 35.0)
    assert upright.geometry.origin_mm == (-10.0, 20.0, 30.0 - 39.0)
    assert upright.places_mm == tuple(39.0 - place for place in reversed(PLACES))
    assert np.array_equal(upright.planes, volume.voxels[::-1])
