"""What comes out of DICOM pixels, value by value: compressed, multi-frame, tilted, uneven, half of a series."""

import io

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from meddino.core.errors import VolumeError
from meddino.data.corpus import Corpus
from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.dicom.stored_values import open_frames
from meddino.volumes.orientation import to_axial_lps
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import ct_slice, enhanced_ct, write_enhanced, write_series
from tests.data_curation.test_build import run_build
from tests.data_curation.test_dicom import LIMITS, candidates, volumes


def packed_by_itk(hu: np.ndarray, compressor: str, folder) -> bytes:
    """One frame of int16, compressed by GDCM."""
    image = sitk.GetImageFromArray(hu)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(image)
    data = pydicom.dcmread(folder / "packed.dcm").PixelData
    (folder / "packed.dcm").unlink()
    return next(generate_frames(data, number_of_frames=1))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless])
def test_series__lossless_jpeg_2000_and_ls_give_the_values_that_were_packed(tmp_path, syntax):
    hu = make_hu(0)
    for index, plane in enumerate(hu):
        item = ct_slice(plane, 5.0 * index)
        if syntax == JPEGLSLossless:
            pytest.importorskip("jpeg_ls", reason="needs an encoder of JPEG-LS (pip install pyjpegls)")
            item.compress(syntax)
        else:
            frame = packed_by_itk(plane, "JPEG" if syntax == JPEGLosslessSV1 else "JPEG2000", tmp_path)
            item.PixelRepresentation, item.RescaleIntercept = 1, 0
            item.file_meta.TransferSyntaxUID, item.PixelData = syntax, encapsulate([frame])
            item["PixelData"].VR = "OB"
        item.save_as(tmp_path / f"{index}", enforce_file_format=True)
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, hu)
    assert notes == ()


def test_series__13_bit_jpeg_2000_whose_header_contradicts_its_codestream(tmp_path):
    """The codestream says unsigned, the header signed: decoded by Pillow and turned by hand, and by our reader."""
    source = get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)
    item = pydicom.dcmread(source)
    with Image.open(io.BytesIO(next(generate_frames(item.PixelData, number_of_frames=1)))) as picture:
        stored = np.asarray(picture).astype(np.int32) >> 3  # Pillow scales 13 bits up to 16
    assert stored.max() >= 4096
    expected = np.where(stored >= 4096, stored - 8192, stored) * int(item.RescaleSlope) + int(item.RescaleIntercept)
    item.save_as(tmp_path / "slice", enforce_file_format=True)
    (candidate,) = candidates(tmp_path)
    assert np.array_equal(read_dicom_volume(candidate.stack, LIMITS).voxels[0], expected)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_enhanced__frames_in_any_order_come_out_from_the_feet_up(tmp_path, order):
    hu = make_hu(0)
    write_enhanced(tmp_path / "enhanced", hu, order)
    (candidate,) = candidates(tmp_path)
    volume = read_dicom_volume(candidate.stack, LIMITS)
    assert volume.geometry.spacing_mm == (2.0, 0.8, 0.8)
    upright, _ = to_axial_lps(volume, 35.0)
    assert np.array_equal(upright.planes, hu)


@pytest.mark.parametrize("packed", [False, True])
def test_enhanced__every_frame_has_its_own_rescale(tmp_path, packed):
    hu = make_hu(0)
    item = enhanced_ct(hu)
    if packed:
        item.compress(pydicom.uid.RLELossless)
    for z, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
        scale = Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = 1, -1024 + 10 * z
        frame.PixelValueTransformationSequence = [scale]
    item.save_as(tmp_path / "enhanced", enforce_file_format=True)
    ((read, _),) = volumes(tmp_path)
    assert np.array_equal(read, hu + 10 * np.arange(6, dtype=np.int16)[:, None, None])


def test_enhanced__unused_bits_are_cleared_and_a_short_file_ends_at_its_last_whole_frame(tmp_path):
    hu = make_hu(0)
    stored = (hu.astype(np.int32) + 1024).astype(np.uint16)
    path = tmp_path / "enhanced"
    enhanced_ct(hu, BitsStored=12, HighBit=11, PixelData=(stored | 0xF000).tobytes()).save_as(path, enforce_file_format=True)
    frames = open_frames(path)
    assert len(frames) == 6
    assert np.array_equal(np.stack([frames[z] for z in range(6)]), np.minimum(stored, 4095))
    short = enhanced_ct(hu, PixelData=stored[:3].tobytes())
    short.save_as(path, enforce_file_format=True)
    frames = open_frames(path)
    assert [frames[z] is None for z in range(6)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_enhanced__compressed_frames_in_any_order_and_a_damaged_one_is_left_out(tmp_path, compressor):
    hu, order = make_hu(0), [3, 0, 5, 1, 4, 2]
    item = enhanced_ct(hu, order, PixelRepresentation=1)
    item.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = 0
    frames = [packed_by_itk(hu[z], compressor, tmp_path) for z in order]
    item.file_meta.TransferSyntaxUID = JPEGLosslessSV1 if compressor == "JPEG" else JPEG2000Lossless
    for damaged in (False, True):
        if damaged:
            frames[0] = frames[0][:40]
        item.PixelData = encapsulate(frames)
        item["PixelData"].VR = "OB"
        item.save_as(tmp_path / "enhanced", enforce_file_format=True)
        ((read, notes),) = volumes(tmp_path)
        assert np.array_equal(read, np.delete(hu, 3, axis=0) if damaged else hu)
        assert ("1 slices cannot be read" in notes) == damaged


def test_enhanced__two_files_of_a_series_are_two_volumes(tmp_path):
    write_enhanced(tmp_path / "a", make_hu(0))
    enhanced_ct(make_hu(1), SOPInstanceUID="1.2.3").save_as(tmp_path / "b", enforce_file_format=True)
    assert {read.tobytes() for read, _ in volumes(tmp_path)} == {make_hu(0).tobytes(), make_hu(1).tobytes()}


def test_series__gantry_tilt_is_noted_and_no_voxel_changes(tmp_path, salt_file):
    hu = make_hu(0)
    sine, cosine = np.sin(np.radians(20)), np.cos(np.radians(20))
    turned = {"ImageOrientationPatient": [1, 0, 0, 0, float(cosine), float(-sine)], "GantryDetectorTilt": 20}
    (tmp_path / "in").mkdir()
    for z, plane in enumerate(hu):
        ct_slice(plane, 5.0 * z, **turned).save_as(tmp_path / "in" / f"{z}", enforce_file_format=True)
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    (row,) = corpus.volumes.to_pylist()
    assert "gantry tilted by 20.0 degrees" in row["notes"]
    assert row["tilt_deg"] == pytest.approx(20, abs=0.01)
    assert row["spacing_mm"][0] == pytest.approx(5 * cosine)  # between the planes, not along the table
    assert {corpus.read(index).tobytes() for index in range(6)} == {plane.tobytes() for plane in hu}


def test_series__uneven_slices_keep_their_true_places(tmp_path, salt_file):
    hu, places = make_hu(0), [0.0, 5.0, 10.0, 12.5, 17.5, 30.0]
    (tmp_path / "in").mkdir()
    for plane, place in zip(hu, places, strict=True):
        ct_slice(plane, place).save_as(tmp_path / "in" / f"{place}", enforce_file_format=True)
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    rows = sorted(corpus.slices.to_pylist(), key=lambda row: row["z_index"])
    assert [row["z_mm"] for row in rows] == places
    assert "slices are missing" in corpus.volumes.to_pylist()[0]["notes"]
    even = [place for place in places if place != 30.0]
    for place in set(places) - set(even):
        (tmp_path / "in" / f"{place}").unlink()
    ((_, notes),) = volumes(tmp_path / "in")
    assert notes == ("slice distance is uneven",)


def test_series__half_of_it_is_a_volume_and_more_than_half_unreadable_is_none(tmp_path, salt_file, capsys):
    hu = make_hu(0, (8, 64, 72))
    paths = write_series(tmp_path / "half", hu)
    for path in paths[4:]:
        path.unlink()  # nothing tells that there was more
    damaged = write_series(tmp_path / "damaged", make_hu(1, (8, 64, 72)), series="other")
    for path in damaged[:5]:
        path.write_bytes(path.read_bytes()[:-4000])
    assert run_build(tmp_path, tmp_path / "out", salt_file, "workers=1", "limits.max_rejected_fraction=1") == 0
    corpus = Corpus(tmp_path / "out")
    assert {corpus.read(index).tobytes() for index in range(len(corpus))} == {plane.tobytes() for plane in hu[:4]}
    (refused,) = [row for row in corpus.volumes.to_pylist() if row["status"] == "rejected"]
    assert "5 of 8 slices cannot be read" in refused["reason"]


def test_series__a_size_that_contradicts_the_header_is_refused(tmp_path):
    item = ct_slice(make_hu(0)[0], 0.0, Rows=30000, Columns=30000)
    item.save_as(tmp_path / "slice", enforce_file_format=True)
    (candidate,) = candidates(tmp_path)
    with pytest.raises(VolumeError, match=r"max_volume_voxels|cannot be read"):
        read_dicom_volume(candidate.stack, LIMITS)
