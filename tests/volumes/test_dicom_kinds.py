"""DICOM as archives, consoles and anonymisers leave it: read right, parted right, or refused with the right reason."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MRImageStorage,
    RLELossless,
)

from meddino.core.errors import VolumeError
from meddino.volumes.dicom.headers import read_header
from meddino.volumes.read import find_series, read_volume
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import ct_slice, enhanced_ct, write_series

A, B, C = make_hu(0), make_hu(1), make_hu(2)


def write(folder, hu, name="", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(hu):
        told = {key: value(z) if callable(value) else value for key, value in changes.items()}
        ct_slice(plane, told.pop("z_mm", 5.0 * z), **told).save_as(folder / f"{name}{z:03d}", enforce_file_format=True)


def contents(folder) -> list[bytes]:
    """The voxels of every volume that is read."""
    return sorted(np.ascontiguousarray(found.read().voxels).tobytes() for found in find_series(folder) if not found.problem)


def problems(folder) -> list[str]:
    return [found.problem for found in find_series(folder) if found.problem]


@pytest.mark.parametrize(
    "facts",
    [
        ({"KVP": 50}, {"KVP": 190}),
        ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "E 50"]}, {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "E 190"]}),
        ({"ImageComments": "RESP 0%"}, {"ImageComments": "RESP 33%"}),
        ({"ImagePositionPatient": lambda z: [-100, -120, 5.0 * z]}, {"ImagePositionPatient": lambda z: [-90, -120, 5.0 * z]}),
        ({"InstanceNumber": lambda z: z + 1}, {"InstanceNumber": lambda z: z + 50}),
        (
            {"InstanceNumber": 1, "AcquisitionTime": lambda z: f"1000{z:02d}"},
            {"InstanceNumber": 1, "AcquisitionTime": lambda z: f"1001{z:02d}"},
        ),
    ],
)  # fmt: skip
def test_two_pictures_at_each_place__are_parted_by_what_differs(tmp_path, facts):
    write(tmp_path, A, "x", **facts[0])
    write(tmp_path, B, "a", **facts[1])
    assert contents(tmp_path) == sorted([A.tobytes(), B.tobytes()])


def test_two_pictures_at_each_place__that_nothing_tells_apart_are_refused(tmp_path):
    write(tmp_path, A, "x", InstanceNumber=1)
    write(tmp_path, B, "a", InstanceNumber=1, SOPInstanceUID=lambda z: f"1.2.{z}")
    assert contents(tmp_path) == []
    assert "6 of 6 positions" in problems(tmp_path)[0]


def test_a_few_contradicting_slices__are_left_out_and_told(tmp_path):
    hu = make_hu(0, (120, 16, 16))
    write(tmp_path, hu, "x")
    ct_slice(hu[7] + 1, 35.0, InstanceNumber=8, SOPInstanceUID="1.2.3").save_as(tmp_path / "a", enforce_file_format=True)
    (found,) = find_series(tmp_path)
    volume = found.read()
    assert np.array_equal(volume.voxels, np.delete(hu, 7, axis=0))
    assert "1 positions with contradicting slices left out" in volume.notes


@pytest.mark.parametrize("uid", [lambda z: "1.2.3.4", lambda z: f"1.2.3.{z // 2}"])
def test_one_uid_at_several_places__makes_no_copies_of_different_slices(tmp_path, uid):
    write(tmp_path, A, SOPInstanceUID=uid)
    ct_slice(A[2], 10.0, SOPInstanceUID=uid(2)).save_as(tmp_path / "sent again", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert "SOPInstanceUIDs are not unique: pictures at different places have the same" in volume.notes
    assert "1 duplicated slices left out" in volume.notes


def test_one_uid_for_all__of_two_passes_leaves_what_tells_them_apart(tmp_path):
    write(tmp_path, A, "x", SOPInstanceUID="1.2.3.4", AcquisitionNumber=1)
    write(tmp_path, B, "a", SOPInstanceUID="1.2.3.4", AcquisitionNumber=2)
    assert contents(tmp_path) == sorted([A.tobytes(), B.tobytes()])


def test_copies__whose_positions_were_rounded_are_copies_and_their_uids_are_unique(tmp_path):
    write(tmp_path, A, "x", SOPInstanceUID=lambda z: f"1.2.3.{z}")
    write(tmp_path, A, "a", SOPInstanceUID=lambda z: f"1.2.3.{z}", z_mm=lambda z: 5.0 * z + 0.04)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert volume.notes == ("6 duplicated slices left out",)


def test_all_slices_at_one_place__are_refused(tmp_path):
    write(tmp_path, A, ImagePositionPatient=[-100, -120, 0], SliceLocation=lambda z: 5.0 * z)
    assert problems(tmp_path) == ["DICOM: all 6 slices of the series lie at one position"]


@pytest.mark.parametrize("uid", [lambda z: f"1.2.3.{z + 1}", None])
def test_a_series_torn_into_slices__is_put_together(tmp_path, uid):
    write(tmp_path, A, SeriesInstanceUID=uid, FrameOfReferenceUID="1.2.9")
    (found,) = find_series(tmp_path)
    assert np.array_equal(found.read().voxels, A)
    assert "put together by study, orientation and place" in found.read().notes[0]


def test_a_name_spelt_differently__is_one_patient_and_another_id_is_not(tmp_path):
    def spelling(z):
        return "Doe^Jane" if z % 2 else "DOE^JANE^^^"

    write(tmp_path / "one", A, PatientName=spelling, PatientBirthDate=lambda z: "19550213" if z % 2 else "")
    assert contents(tmp_path / "one") == [A.tobytes()]
    write(tmp_path / "nobody", A, PatientID="ANONYMOUS", PatientName=lambda z: f"Person^{'ab'[z % 2]}")
    assert len(contents(tmp_path / "nobody")) == 2


def frame_content(item: pydicom.Dataset, **values) -> None:
    for index, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
        content = Dataset()
        for name, value in values.items():
            setattr(content, name, value(index))
        frame.FrameContentSequence = [content]


def test_enhanced__two_time_points_in_one_file_are_two_volumes(tmp_path):
    both = np.stack([A, B], axis=1).reshape(12, *A.shape[1:])
    item = enhanced_ct(both)
    for index, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
        frame.PlanePositionSequence[0].ImagePositionPatient = [-100, -120, 2.0 * (index // 2)]
    frame_content(item, TemporalPositionIndex=lambda index: index % 2 + 1)
    item.save_as(tmp_path / "enhanced", enforce_file_format=True)
    assert contents(tmp_path) == sorted([A.tobytes(), B.tobytes()])


def test_enhanced__two_geometries_in_one_file_are_two_volumes(tmp_path):
    item = enhanced_ct(np.concatenate([A, B]))
    del item.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    for index, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
        orientation = Dataset()
        orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if index < 6 else [0, 1, 0, 0, 0, -1]
        frame.PlaneOrientationSequence = [orientation]
        if index >= 6:
            frame.PlanePositionSequence[0].ImagePositionPatient = [3.0 * index, 0, 0]
    item.save_as(tmp_path / "enhanced", enforce_file_format=True)
    read = [found.read() for found in find_series(tmp_path)]
    assert [volume.voxels.shape[0] for volume in read] == [6, 6]
    assert A.tobytes() in contents(tmp_path)


def test_enhanced__one_uid_for_two_files_loses_no_frame_and_a_copy_of_a_file_is_one(tmp_path):
    for name, hu, first in (("a", A, 0), ("b", B, 6), ("copy", A, 0)):
        item = enhanced_ct(hu, SOPInstanceUID="1.2.9")
        for index, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
            frame.PlanePositionSequence[0].ImagePositionPatient = [-100, -120, 2.0 * (first + index)]
        item.save_as(tmp_path / name, enforce_file_format=True)
    assert contents(tmp_path) == sorted([A.tobytes(), B.tobytes()])
    notes = [note for found in find_series(tmp_path) for note in found.stack.notes]
    assert sum("not unique" in note for note in notes) == 2
    assert notes.count("6 duplicated slices left out") == 1


@pytest.mark.parametrize(("counted", "described"), [(6, 0), (6, 4), (4, 6)])
def test_enhanced__more_or_fewer_frames_described_than_counted_is_refused(tmp_path, counted, described):
    item = enhanced_ct(A, NumberOfFrames=counted)
    item.PerFrameFunctionalGroupsSequence = item.PerFrameFunctionalGroupsSequence[:described]
    item.save_as(tmp_path / "enhanced", enforce_file_format=True)
    assert problems(tmp_path) == [f"DICOM: NumberOfFrames is {counted}, the header describes {described} frames"]


@pytest.mark.parametrize("kind", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage])
def test_enhanced__legacy_converted_too_and_compressed_without_a_temporary_folder(tmp_path, kind, monkeypatch):
    item = enhanced_ct(A, SOPClassUID=kind)
    item.file_meta.MediaStorageSOPClassUID = kind
    item.compress(RLELossless, generate_instance_uid=False)
    item.save_as(tmp_path / "enhanced", enforce_file_format=True)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert contents(tmp_path) == [A.tobytes()]


def test_plain_ct_storage__with_frames_is_read_whole_and_told(tmp_path):
    item = ct_slice(A[0], 10.0, NumberOfFrames=6, SpacingBetweenSlices=3.0)
    item.PixelData = (A.astype(np.int32) + 1024).astype("<u2").tobytes()
    item.save_as(tmp_path / "cone beam", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert volume.geometry.spacing_mm[0] == pytest.approx(3.0)
    assert any("only the first frame's place" in note for note in volume.notes)


@pytest.mark.parametrize("changes", [{}, {"BitsStored": 12, "HighBit": 11}])
def test_monochrome1__is_about_display_and_turns_no_value_over(tmp_path, changes):
    write(tmp_path, A, PhotometricInterpretation="MONOCHROME1", **changes)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert volume.photometric == "MONOCHROME1"


@pytest.mark.parametrize(("signed", "stored", "vr"), [(1, -2000, "SS"), (0, 63536, "US")])
def test_padding__becomes_air_and_is_told(tmp_path, signed, stored, vr):
    expected = A.copy()
    expected[:, :5] = -1024
    for z, plane in enumerate(A):
        values = plane.astype(np.int32) + 1024
        values[:5] = stored
        item = ct_slice(plane, 5.0 * z, PixelRepresentation=signed)
        item.PixelData = values.astype("<i2" if signed else "<u2").tobytes()
        item.add_new(0x00280120, vr, stored)
        item.save_as(tmp_path / f"{z}", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, expected)
    assert "set to -1024 HU" in volume.notes[0]


def test_values__beyond_int16_are_clipped_and_told(tmp_path):
    for z, plane in enumerate(A):
        item = ct_slice(plane, 5.0 * z, RescaleIntercept="0", PixelRepresentation=0)
        stored = (plane.astype(np.int32) + 1024).astype("<u2")
        stored[0, :3] = 40000
        item.PixelData = stored.tobytes()
        item.save_as(tmp_path / f"{z}", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert (volume.voxels[:, 0, :3] == 32767).all()
    assert volume.notes == (f"{3 * len(A)} voxels beyond -32768 to 32767 HU clipped",)


def test_padding__among_real_values_is_left_and_told(tmp_path):
    items = [ct_slice(plane, 5.0 * z) for z, plane in enumerate(A)]
    for z, item in enumerate(items):
        item.add_new(0x00280120, "US", 1024)  # 0 HU: water
        item.save_as(tmp_path / f"{z}", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert "lies at 0 HU" in volume.notes[0]


@pytest.mark.parametrize(("changes", "reason"), [({"RescaleType": "ED"}, "rescale type is ED"), ({"RescaleType": "HU"}, "")])
def test_rescale_type__that_is_no_hu_is_refused(tmp_path, changes, reason):
    write(tmp_path, A, **changes)
    assert problems(tmp_path) == ([f"DICOM: {reason}, not HU"] if reason else [])


def test_rescale__of_each_slice_counts_and_a_missing_one_is_refused(tmp_path):
    for z, plane in enumerate(A):
        doubled = ((plane.astype(np.int32) + 1024) * 2).astype("<u2").tobytes()
        changes = {"RescaleSlope": "0.5", "PixelData": doubled} if z % 2 else {}
        item = ct_slice(plane, 5.0 * z)
        for name, value in changes.items():
            setattr(item, name, value)
        item.save_as(tmp_path / f"{z}", enforce_file_format=True)
    assert np.array_equal(read_volume(tmp_path).voxels, A)
    item = pydicom.dcmread(tmp_path / "2")
    del item.RescaleSlope, item.RescaleIntercept
    item.save_as(tmp_path / "2", enforce_file_format=True)
    with pytest.raises(VolumeError, match="1 of 6 slices lack the rescale"):
        read_volume(tmp_path)


def write_mr(folder, slopes):
    """One slice for each slope; None: without a rescale, "": with empty elements."""
    for z, slope in enumerate(slopes):
        rescale = {"RescaleSlope": slope, "RescaleIntercept": slope if not slope else 0}
        item = ct_slice(A[z], 5.0 * z, SOPClassUID=MRImageStorage, Modality="MR", **rescale)
        item.file_meta.MediaStorageSOPClassUID = MRImageStorage
        item.save_as(folder / f"{z}", enforce_file_format=True)


@pytest.mark.parametrize("lacking", [None, ""])
def test_rescale__missing_in_some_slices_of_mr_is_refused_too(tmp_path, lacking):
    write_mr(tmp_path, [3, lacking] * 3)
    with pytest.raises(VolumeError, match="3 of 6 slices lack the rescale that the others have"):
        read_volume(tmp_path)


@pytest.mark.parametrize("slopes", [[1, 2, 3, 4, 5, 6], [None] * 6, [1, None] * 3])
def test_rescale__of_each_mr_slice_counts(tmp_path, slopes):
    write_mr(tmp_path, slopes)
    stored = A.astype(np.int32) + 1024
    assert np.array_equal(read_volume(tmp_path).voxels, stored * np.array([slope or 1 for slope in slopes])[:, None, None])


def test_rescale__that_is_no_number_is_a_missing_one(tmp_path):
    paths = write_series(tmp_path, A)
    data = paths[2].read_bytes()
    assert data.count(b"-1024.0 ") == 1
    paths[2].write_bytes(data.replace(b"-1024.0 ", b"-1o24.0 "))
    with pytest.raises(VolumeError, match="1 of 6 slices lack the rescale to HU"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("said", "reason"), [("PT", "modality is PT"), ("DOE", "modality is unknown"), ("CT\\DOE", "modality is unknown")]
)
def test_modality__is_repeated_only_where_it_is_one_of_the_standards(tmp_path, said, reason):
    ct_slice(A[0], 0.0, Modality=said).save_as(tmp_path / "slice", enforce_file_format=True)
    assert problems(tmp_path) == [f"DICOM: {reason}"]
    kind = "1.2.840.10008.5.1.4.1.1.1.1"  # a radiograph
    picture = ct_slice(A[0], 0.0, Modality=said, SOPClassUID=kind)
    picture.save_as(tmp_path / "picture", enforce_file_format=True)
    assert read_header(tmp_path / "picture", "picture", "").picture == (f"DICOM: {reason}" if said != "PT" else "")


@pytest.mark.parametrize(("name", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_float_pixels__are_refused_by_name(tmp_path, name, kind, syntax):
    item = ct_slice(A[0], 0.0, PixelData=None, **{name: A[0].astype(kind).tobytes()})
    item.file_meta.TransferSyntaxUID = syntax
    item.save_as(tmp_path / "slice", enforce_file_format=True)
    assert problems(tmp_path) == ["DICOM: float pixel data, which is not read here"]


def test_syntax__ges_private_one_and_deflated(tmp_path):
    (tmp_path / "ge").mkdir()
    for z, plane in enumerate(A):
        item = ct_slice(plane, 5.0 * z)
        item.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        item.PixelData = (plane.astype(np.int32) + 1024).astype(">u2").tobytes()
        item.save_as(tmp_path / "ge" / f"{z}", enforce_file_format=True)
        data = (tmp_path / "ge" / f"{z}").read_bytes()
        (tmp_path / "ge" / f"{z}").write_bytes(data.replace(b"1.2.840.10008.1.2\0", b"1.2.840.113619.5.2", 1))
    assert contents(tmp_path / "ge") == [A.tobytes()]
    (tmp_path / "deflated").mkdir()
    for z, plane in enumerate(A):
        item = ct_slice(plane, 5.0 * z)
        item.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        item.save_as(tmp_path / "deflated" / f"{z}", enforce_file_format=True)
    assert contents(tmp_path / "deflated") == [A.tobytes()]


def test_folder__of_a_cd_gives_the_ct_and_says_what_lay_beside_it(tmp_path):
    write_series(tmp_path / "ct", A)
    (tmp_path / "ct" / "._IM000").write_bytes(b"\x00\x05\x16\x07" + bytes(500))
    (tmp_path / "DICOMDIR").write_bytes(b"index")
    beside = {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "dose": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67", "Modality": "SR"},
        "capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        "structures": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3", "Modality": "RTSTRUCT"},
        "labels": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "Modality": "SEG"},
    }
    for name, changes in beside.items():
        ct_slice(B[0], 0.0, series=name, **changes).save_as(tmp_path / name, enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A)
    assert sum(note.startswith("left out beside it: ") for note in volume.notes) == 5
    write_series(tmp_path / "second", C, series="second")
    with pytest.raises(VolumeError, match="holds 2 DICOM volumes"):
        read_volume(tmp_path)


def test_uneven_slices__make_no_regular_grid(tmp_path):
    paths = write_series(tmp_path, A)
    paths[2].unlink()
    assert read_volume(tmp_path).irregular == "1 slices are missing"


def test_names__in_bytes_that_are_no_utf8(tmp_path):
    import os

    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    for z, plane in enumerate(A):
        ct_slice(plane, 5.0 * z).save_as(folder / os.fsdecode(b"Bild_\xe4_%d" % z), enforce_file_format=True)
    assert contents(tmp_path) == [A.tobytes()]


def test_a_full_disk__is_raised_and_a_file_that_has_gone_is_a_lost_slice(tmp_path, monkeypatch):
    import errno

    from meddino.volumes.dicom import pixels

    paths = write_series(tmp_path, A)
    (found,) = find_series(tmp_path)
    paths[0].unlink()
    assert "1 slices cannot be read" in found.read().notes

    def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pixels, "open_frames", fails)
    with pytest.raises(OSError, match="No space left"):
        found.read()


def test_rescale__a_slope_of_0_is_refused_by_name(tmp_path):
    paths = write_series(tmp_path, A)
    item = pydicom.dcmread(paths[2])
    item.RescaleSlope = 0
    item.save_as(paths[2], enforce_file_format=True)
    assert problems(tmp_path) == ["DICOM: rescale slope is 0"]
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, np.delete(A, 2, axis=0))
    assert set(volume.notes) == {"1 slices are missing", "left out beside it: DICOM: rescale slope is 0"}


def test_rescale__a_slope_of_0_in_a_frame_is_refused_too(tmp_path):
    item = enhanced_ct(A)
    item.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence = [Dataset()]
    scale = item.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence[0]
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 0, 0, "HU"
    item.save_as(tmp_path / "a", enforce_file_format=True)
    assert problems(tmp_path) == ["DICOM: rescale slope is 0"]


def test_rescale__half_of_it_is_told(tmp_path):
    write_series(tmp_path, A + 1024, RescaleSlope=None)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A + 1024)  # the slope is 1
    assert volume.notes == ("only one of rescale slope and intercept is in the file: the other is taken as 1 or 0",)


def test_rescale__fractions_of_hu_are_rounded_and_told(tmp_path):
    write(tmp_path, A, RescaleSlope="0.75")
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, np.rint((A + 1024.0) * 0.75 - 1024))
    assert volume.notes == ("values with fractions of HU rounded to whole HU",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PixelSpacing": [0, 0]}, "pixel spacing is 0 and 0 mm; must be above 0"),
        (
            {"ImageOrientationPatient": [1, 0, 0, 0.3, 0.95, 0]},
            "orientation is 1, 0, 0, 0.3, 0.95, 0; rows and columns must be at right angles",
        ),
        ({"ImageOrientationPatient": [0] * 6}, "orientation is 0, 0, 0, 0, 0, 0; must be two directions of length 1"),
        ({"PixelSpacing": None}, "position, orientation or pixel spacing is missing or no number"),
        (
            {"NumberOfFrames": 2, "SliceThickness": None},
            "its frames have neither positions, nor a distance (SpacingBetweenSlices, SliceThickness)",
        ),
    ],
)
def test_plane__what_is_none_is_refused_with_the_value(tmp_path, changes, reason):
    write(tmp_path, A[:1], **changes)
    assert problems(tmp_path) == [f"DICOM: {reason}"]


def test_plane__directions_that_are_not_of_length_1_are_told(tmp_path):
    write_series(tmp_path, A, ImageOrientationPatient=[0.5, 0, 0, 0, 0.5, 0])
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.voxels, A) and volume.spacing_mm == (5.0, 4.5, 4.5)
    assert volume.notes == ("directions of rows and columns are not of length 1 in the file: taken as if they were",)
