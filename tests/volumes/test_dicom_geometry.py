"""DICOM of any orientation, tilt, spacing, order, name and transfer syntax: equal in value, place and direction."""

import shutil

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy.spatial.transform import Rotation

from meddino.volumes.read import find_series
from tests.data_curation.dicom_files import ct_slice, enhanced_ct
from tests.data_curation.test_dicom_pixels import packed_by_itk

BY_ITK = {JPEGLosslessSV1: "JPEG", JPEG2000Lossless: "JPEG2000"}
SYNTAXES = [
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
    JPEGLSLossless, *BY_ITK,
]  # fmt: skip
NAMES = ["IM%03d", "%d.dcm", "Größe %d", "1.2.840.%d", 'a\'b "%d"', "slice_%04d"]


def random_grid(rng: np.random.Generator, slices: int, tilt_deg: float):
    """Directions of rows and columns, first pixels of the slices [Z, 3] along their normal, spacing (z, y, x)."""
    turn = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix().round(9)
    rows, cols, normal = turn.T
    step, dy, dx = rng.uniform(0.4, 6, 3).round(6)
    tilt = np.radians(tilt_deg)
    along = np.cos(tilt) * normal + np.sin(tilt) * cols  # a table that does not move along the normal
    first = rng.uniform(-300, 300, 3)
    places = (first + np.arange(slices)[:, None] * step * along).round(7)
    return rows, cols, places, (step * np.cos(tilt), dy, dx)


def put_pixels(item, hu: np.ndarray, syntax: str, signed: bool, folder) -> None:
    """Store [F, rows, cols] in a syntax."""
    stored = (hu.astype(np.int32) + (0 if signed else 1024)).astype("<i2" if signed else "<u2")
    item.PixelRepresentation, item.file_meta.TransferSyntaxUID = int(signed), syntax
    values = item.get("SharedFunctionalGroupsSequence")
    scaled = values[0].PixelValueTransformationSequence[0] if values else item
    scaled.RescaleIntercept = 0 if signed else -1024
    if syntax in BY_ITK:
        item.PixelData = encapsulate([packed_by_itk(plane.astype(np.int16), BY_ITK[syntax], folder) for plane in stored])
        item["PixelData"].VR = "OB"
    elif syntax in (RLELossless, JPEGLSLossless):
        item.file_meta.TransferSyntaxUID, item.PixelData = ExplicitVRLittleEndian, stored.tobytes()
        item.compress(syntax, generate_instance_uid=False)
    else:
        item.PixelData = (stored.byteswap() if syntax == ExplicitVRBigEndian else stored).tobytes()
        item["PixelData"].VR = "OW"


def save(item, path) -> None:
    if item.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
        pydicom.dcmwrite(path, item, implicit_vr=False, little_endian=False, force_encoding=True)
    else:
        item.save_as(path, enforce_file_format=True)


def write_files(folder, hu, grid, syntax, signed, name, order, frames) -> None:
    rows, cols, places, (_, dy, dx) = grid
    orientation = [*rows.tolist(), *cols.tolist()]
    if not frames:
        for number, z in enumerate(order):
            geometry = {"ImageOrientationPatient": orientation, "ImagePositionPatient": places[z].tolist()}
            item = ct_slice(hu[z], float(z), PixelSpacing=[dy, dx], InstanceNumber=int(number) + 1, **geometry)
            put_pixels(item, hu[z : z + 1], syntax, signed, folder)
            save(item, folder / (name % number))
        return
    item = enhanced_ct(hu)
    shared = item.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence[0].PixelSpacing = [dy, dx]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = orientation
    for frame, z in zip(item.PerFrameFunctionalGroupsSequence, order, strict=True):
        position = Dataset()
        position.ImagePositionPatient = places[z].tolist()
        frame.PlanePositionSequence = [position]
    put_pixels(item, hu[order], syntax, signed, folder)
    save(item, folder / (name % 0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31), syntax=st.sampled_from(SYNTAXES), name=st.sampled_from(NAMES), frames=st.booleans(),
    signed=st.booleans(), tilt_deg=st.sampled_from([0.0, 0.0, 12.0]),
)  # fmt: skip
def test_dicom__lies_where_it_was_written_and_holds_what_was_written(tmp_path, seed, syntax, name, frames, signed, tilt_deg):
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="needs an encoder of JPEG-LS (pip install pyjpegls)")
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 3000, rng.integers([2, 12, 12], [6, 20, 20])).astype(np.int16)
    grid = random_grid(rng, len(hu), tilt_deg)
    folder = tmp_path / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    signed = signed or syntax in BY_ITK
    with pydicom.config.disable_value_validation():  # more digits than DICOM's 16 letters hold
        write_files(folder, hu, grid, syntax, signed, name, rng.permutation(len(hu)), frames)
    (found,) = find_series(folder)
    volume = found.read()
    rows, cols, places, spacing = grid
    assert np.array_equal(volume.voxels, hu)
    np.testing.assert_allclose(volume.geometry.spacing_mm, spacing, rtol=1e-5)
    np.testing.assert_allclose(volume.geometry.axes, [np.cross(rows, cols), cols, rows], atol=1e-6)
    np.testing.assert_allclose(volume.geometry.origin_mm, places[0], atol=1e-5)
    shifted = np.sin(np.radians(tilt_deg)) * np.linalg.norm(places[-1] - places[0]) > 0.5 * spacing[1]
    assert bool(volume.irregular) == shifted
    if not tilt_deg:
        last = places[-1] + (hu.shape[2] - 1) * spacing[2] * rows + (hu.shape[1] - 1) * spacing[1] * cols
        np.testing.assert_allclose(volume.geometry.corners_mm()[-1], last, atol=1e-3)
