"""Structures of DICOM-SEG and RTSTRUCT on an image's grid, against slow loops and what highdicom wrote."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from pydicom.uid import generate_uid

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.structures import fill_polygon, read_structures, structure_names
from meddino.volumes.read import read_volume
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import in_mm, rtstruct, write_series


def inside_slowly(points, row, col) -> bool:
    """The even-odd rule as every textbook has it: a ray to the right, its crossings counted."""
    inside = False
    for (row_0, col_0), (row_1, col_1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (row_0 > row) != (row_1 > row) and col < col_0 + (row - row_0) * (col_1 - col_0) / (row_1 - row_0):
            inside = not inside
    return inside


@pytest.mark.parametrize("corners", [3, 5, 24])
def test_fill_polygon__is_the_slow_ray_and_matplotlib(corners):
    rng = np.random.default_rng(corners)
    points = rng.uniform(-3, 23, (corners, 2))  # crosses itself and leaves the picture
    rows, cols = np.mgrid[0:17, 0:21]
    slow = np.array([[inside_slowly(points, row, col) for col in range(21)] for row in range(17)])
    assert slow.any()
    assert np.array_equal(fill_polygon(points, (17, 21)), slow)
    if corners == 3:  # matplotlib's rule for polygons that cross themselves is another one
        centres = np.stack([rows.ravel(), cols.ravel()], axis=1)
        assert np.array_equal(slow.ravel(), Polygon(np.vstack([points, points[:1]]), closed=True).contains_points(centres))


def test_fill_polygon__neighbours_share_no_centre_on_their_common_edge():
    left, right = np.array([[0, 0], [4, 0], [4, 3], [0, 3]]), np.array([[0, 3], [4, 3], [4, 6], [0, 6]])
    both = fill_polygon(left.astype(float), (5, 7)).astype(int) + fill_polygon(right.astype(float), (5, 7))
    assert both.max() == 1
    assert both.sum() == 4 * 6


def test_rtstruct__contours_are_filled_and_inner_ones_are_holes(tmp_path):
    write_series(tmp_path / "scan", make_hu(0, (4, 24, 20)))
    grid = read_volume(tmp_path / "scan").geometry
    outer, hole = [(2.5, 3.5), (2.5, 15.5), (18.5, 15.5), (18.5, 3.5)], [(6.5, 6.5), (6.5, 9.5), (10.5, 9.5), (10.5, 6.5)]
    slanted = [(1.2, 1.4), (20.7, 5.1), (9.3, 17.8)]
    contours = {"Liver ": [in_mm(grid, 1, outer), in_mm(grid, 1, hole)], "Tumour": [in_mm(grid, z, slanted) for z in (0, 2, 3)]}
    rtstruct(tmp_path / "rs.dcm", contours)
    assert structure_names(tmp_path / "rs.dcm") == ("Liver", "Tumour")
    found = read_structures(tmp_path / "rs.dcm", grid, ["liver", "Tumour", "spleen"])
    assert found.masks["liver"].sum() == 16 * 12 - 4 * 3
    assert not found.masks["liver"][[0, 2, 3]].any()
    slow = [[inside_slowly(np.array(slanted), row, col) for col in range(20)] for row in range(24)]
    assert np.array_equal(found.masks["Tumour"][3], slow)
    assert found.notes == ("contours of 'Tumour' skip 1 slices between others, which stay empty",)


def test_rtstruct__marked_points_are_no_structure_and_contours_between_slices_are_refused(tmp_path):
    write_series(tmp_path / "scan", make_hu(0, (4, 24, 20)))
    grid = read_volume(tmp_path / "scan").geometry
    square = [(2, 2), (2, 9), (9, 9), (9, 2)]
    rtstruct(tmp_path / "point.dcm", {"isocentre": [in_mm(grid, 1, [(3, 3)])]}, kind="POINT")
    assert structure_names(tmp_path / "point.dcm") == ()
    rtstruct(tmp_path / "between.dcm", {"a": [in_mm(grid, 1.5, square)]})
    with pytest.raises(VolumeError, match=r"between\.dcm.*'a' do not lie in the image's slices"):
        read_structures(tmp_path / "between.dcm", grid, ["a"])
    rtstruct(tmp_path / "twice.dcm", {"a": [in_mm(grid, 1, square)], "A ": [in_mm(grid, 1, square)]})
    with pytest.raises(VolumeError, match="two structures have the name 'A'"):
        structure_names(tmp_path / "twice.dcm")
    assert structure_names(tmp_path / "scan" / "IM000") is None


@pytest.mark.parametrize("turned", [False, True], ids=["as it was drawn", "on the turned grid"])
def test_dicom_seg__is_what_highdicom_was_given(tmp_path, turned):
    pytest.importorskip("highdicom")
    from meddino.volumes.dicom.segmentation import write_dicom_seg

    clinical = {
        "PatientName": "Doe",
        "PatientBirthDate": "",
        "PatientSex": "",
        "AccessionNumber": "",
        "StudyDate": "",
        "StudyTime": "",
    }
    clinical |= {"ReferringPhysicianName": "", "StudyID": "", "FrameOfReferenceUID": generate_uid()}
    files = write_series(tmp_path / "scan", make_hu(0, (4, 24, 20)), **clinical)
    grid = read_volume(tmp_path / "scan").geometry
    rng = np.random.default_rng(0)
    masks = {"liver": rng.random((4, 24, 20)) < 0.3, "nothing": np.zeros((4, 24, 20), dtype=bool)}
    masks["spleen"] = (rng.random((4, 24, 20)) < 0.1) & ~masks["liver"]
    masks["spleen"][0] = False  # a slice without a frame
    with warnings.catch_warnings():  # highdicom's quote the patient's name
        warnings.simplefilter("error")
        write_dicom_seg(tmp_path / "seg.dcm", masks, files, "0")
    assert structure_names(tmp_path / "seg.dcm") == ("liver", "nothing", "spleen")
    order, flips = (1, 0, 2), (False, True, True)
    found = read_structures(tmp_path / "seg.dcm", grid.turned(order, flips) if turned else grid, list(masks)).masks
    for name, mask in masks.items():
        wanted = mask.transpose(order)[:, ::-1, ::-1] if turned else mask
        assert np.array_equal(found[name], wanted)
    x, y, z = grid.origin_mm
    moved = replace(grid, origin_mm=(x + 0.4 * grid.spacing_mm[2], y, z))
    with pytest.raises(VolumeError, match="no voxels of the image"):
        read_structures(tmp_path / "seg.dcm", moved, ["liver"])
