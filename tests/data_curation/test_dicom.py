import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources import discovery
from meddino_data_curation.sources.discovery import discover
from pydicom.data import get_testdata_file

from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.orientation import to_axial_lps
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import ct_slice, write_series

LIMITS = CurationConfig().limits


def candidates(folder: Path):
    return discover([SourceConfig(name="test", path=folder)], Salt(b"for tests")).candidates


def volumes(folder: Path):
    """HU [Z, Y, X] from the feet up, and the notes, of every usable candidate."""
    read = [read_dicom_volume(item.stack, LIMITS) for item in candidates(folder) if not item.problem]
    return [(np.ascontiguousarray(to_axial_lps(volume, 35.0)[0].planes), volume.notes) for volume in read]


def test_series__unordered_files_without_extension_in_subfolders(tmp_path):
    hu = make_hu(0)
    paths = write_series(tmp_path / "a", hu)
    (tmp_path / "b" / "deeper").mkdir(parents=True)
    shutil.move(paths[2], tmp_path / "b" / "deeper" / "0001")
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, hu)
    assert notes == ()


def test_discover__several_processes_find_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "_MANY_FILES", 2)
    write_series(tmp_path / "a", make_hu(0))
    write_series(tmp_path / "b", make_hu(1), [f"{z}.dcm" for z in range(6)], series="two")
    (tmp_path / "b" / "3.dcm").write_bytes(b"no DICOM")
    (tmp_path / "b" / "notes").write_text("nor this")
    sources = [SourceConfig(name="test", path=tmp_path)]
    alone, together = (discover(sources, Salt(b"for tests"), workers) for workers in (1, 2))
    assert alone == together
    assert together.files == {
        "DICOM file": 11,
        "unreadable: file is named as DICOM and is none, or damaged": 1,
        "other": 1,
    }


def test_series__several_in_one_folder_stay_apart(tmp_path):
    write_series(tmp_path, make_hu(0), [f"x{z}" for z in range(6)], series="one")
    write_series(tmp_path, make_hu(1), [f"y{z}" for z in range(6)], series="two")
    assert {read.tobytes() for read, _ in volumes(tmp_path)} == {make_hu(0).tobytes(), make_hu(1).tobytes()}


def test_series__another_patient_under_the_same_uid_is_not_merged(tmp_path):
    write_series(tmp_path / "a", make_hu(0), patient="P1")
    write_series(tmp_path / "b", make_hu(1), patient="P2")
    found = volumes(tmp_path)
    assert {read.tobytes() for read, _ in found} == {make_hu(0).tobytes(), make_hu(1).tobytes()}
    assert all("shared with another patient" in notes[0] for _, notes in found)
    assert len({item.patient_key for item in candidates(tmp_path)}) == 2


def test_series__duplicated_and_missing_slices_are_noted(tmp_path):
    hu = make_hu(0, (8, 64, 72))
    paths = write_series(tmp_path, hu)
    shutil.copy(paths[0], tmp_path / "copy")
    paths[3].unlink()
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, np.delete(hu, 3, axis=0))
    assert set(notes) == {"1 duplicated slices left out", "1 slices are missing"}


def test_series__two_passes_over_the_same_places_are_two_volumes(tmp_path):
    write_series(tmp_path / "a", make_hu(0), AcquisitionNumber=1)
    write_series(tmp_path / "b", make_hu(1), AcquisitionNumber=2)
    assert {read.tobytes() for read, _ in volumes(tmp_path)} == {make_hu(0).tobytes(), make_hu(1).tobytes()}


def test_series__damaged_slices_are_left_out_and_more_than_half_refused(tmp_path):
    hu = make_hu(0, (8, 64, 72))
    paths = write_series(tmp_path, hu)
    paths[2].write_bytes(paths[2].read_bytes()[:-3000])
    (item,) = [item for item in candidates(tmp_path) if not item.problem]
    volume = read_dicom_volume(item.stack, LIMITS)
    assert volume.voxels.shape[0] == 7
    assert "1 slices cannot be read" in volume.notes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67"}, "not a CT image but X-Ray Radiation Dose SR"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "not a CT image but MR Image Storage"),
        ({"Modality": "PT"}, "modality is PT"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localiser"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "derived"),
        ({"BurnedInAnnotation": "YES"}, "burned"),
        ({"ImagePositionPatient": None}, "position, orientation or pixel spacing"),
    ],
)
def test_series__what_is_no_ct_slice_is_refused_with_the_reason(tmp_path, changes, reason):
    write_series(tmp_path / "good", make_hu(0), series="good")
    item = ct_slice(make_hu(0)[0], 0.0, series="other", **changes)
    item.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    problems = [candidate.problem for candidate in candidates(tmp_path)]
    assert sorted(bool(problem) for problem in problems) == [False, True]
    assert any(reason in problem for problem in problems)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1], [-1, 0, 0, 0, -1, 0]])
def test_series__other_orientations_are_turned(tmp_path, orientation):
    """A stack acquired along another axis comes out axial, with every voxel where it was."""
    hu = make_hu(0, (48, 64, 56))  # canonical: z up, y back, x left
    rows, cols = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(rows, cols)
    axes = [np.flatnonzero(vector)[0] for vector in (normal, cols, rows)]  # patient axis of stack, row, column; 0 is x
    turned = np.transpose(hu, [2 - axis for axis in axes])
    turned = np.flip(turned, [place for place, vector in enumerate((normal, cols, rows)) if vector.sum() < 0])
    ends = [0.0, 0.0, 0.0]
    for vector, size in zip((normal, cols, rows), turned.shape, strict=True):
        axis = np.flatnonzero(vector)[0]
        ends[axis] = 4.0 * (size - 1) if vector[axis] < 0 else 0.0
    for index, plane in enumerate(turned):
        place = np.array(ends) + normal * 4.0 * index
        changes = {"ImagePositionPatient": place.tolist(), "ImageOrientationPatient": orientation, "PixelSpacing": [4.0, 4.0]}
        ct_slice(plane, float(index), **changes).save_as(tmp_path / f"{index}", enforce_file_format=True)
    ((read, _),) = volumes(tmp_path)
    assert np.array_equal(read, hu)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless"])
def test_series__compressed_files_decode_to_the_same_values(tmp_path, syntax):
    if syntax == "RLELossless":
        hu = make_hu(0)
        for index, plane in enumerate(hu):
            item = ct_slice(plane, 5.0 * index)
            item.compress(getattr(pydicom.uid, syntax))
            item.save_as(tmp_path / f"{index}", enforce_file_format=True)
        ((read, _),) = volumes(tmp_path)
        assert np.array_equal(read, hu)
        return
    source = Path(get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False))
    shutil.copy(source, tmp_path / "slice.dcm")
    found = candidates(tmp_path)
    assert len(found) == 1


def test_series__pydicoms_real_slice(tmp_path):
    shutil.copy(get_testdata_file("CT_small.dcm", download=False), tmp_path / "CT_small")
    ((read, _),) = volumes(tmp_path)
    expected = pydicom.dcmread(tmp_path / "CT_small")
    hu = expected.pixel_array.astype(np.int32) * int(expected.RescaleSlope) + int(expected.RescaleIntercept)
    assert np.array_equal(read[0], hu)


def test_series__an_acquisition_for_each_slice_and_one_slice_twice_stay_one_volume(tmp_path):
    """A place taken twice is no reason to tear up what the acquisition number does not explain."""
    hu = make_hu(0, (8, 64, 72))
    for z, plane in enumerate(hu):
        ct_slice(plane, 5.0 * z, AcquisitionNumber=z + 1).save_as(tmp_path / f"{z}", enforce_file_format=True)
    ct_slice(hu[3], 15.0, AcquisitionNumber=99).save_as(tmp_path / "sent again", enforce_file_format=True)
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, hu)
    assert notes == ("1 duplicated slices left out",)


def test_series__passes_are_told_by_what_tells_them_apart(tmp_path):
    """Two phases whose acquisition number runs through all slices, and one slice of the first twice."""
    for phase in (1, 2):
        for z, plane in enumerate(make_hu(phase)):
            changes = {"AcquisitionNumber": 10 * phase + z, "TemporalPositionIdentifier": phase}
            ct_slice(plane, 5.0 * z, **changes).save_as(tmp_path / f"{phase}{z}", enforce_file_format=True)
    twice = ct_slice(make_hu(1)[2], 10.0, AcquisitionNumber=50, TemporalPositionIdentifier=1)
    twice.save_as(tmp_path / "twice", enforce_file_format=True)
    found = volumes(tmp_path)
    assert {read.tobytes() for read, _ in found} == {make_hu(1).tobytes(), make_hu(2).tobytes()}
    assert sorted(notes for _, notes in found) == [
        ("its series holds 2 volumes",),
        ("its series holds 2 volumes", "1 duplicated slices left out"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        lambda sign: {"PixelSpacing": [f"{4.50005 + sign * 1e-6:.7f}"] * 2},
        lambda sign: {"ImageOrientationPatient": [1, 0.005 + sign * 3e-5, 0, -0.005 - sign * 3e-5, 1, 0]},
        lambda sign: {"ImageOrientationPatient": [1, sign * 1e-9, 0, 0, 1, sign * 1e-9]},
    ],
)
def test_series__values_at_the_edge_of_rounding_stay_one_volume(tmp_path, changes):
    hu = make_hu(0, (8, 64, 72))
    for z, plane in enumerate(hu):
        ct_slice(plane, 5.0 * z, **changes((-1) ** z)).save_as(tmp_path / f"{z}", enforce_file_format=True)
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, hu)
    assert notes == ()


def test_series__stacks_of_other_orientation_and_spacing_stay_apart(tmp_path):
    write_series(tmp_path / "a", make_hu(0))
    write_series(tmp_path / "b", make_hu(1), PixelSpacing=[4.4, 4.4])
    write_series(tmp_path / "c", make_hu(2), ImageOrientationPatient=[1, 0, 0, 0, 0.99, 0.14])
    found = volumes(tmp_path)
    assert len(found) == 3
    assert all("its series holds 3 volumes" in notes for _, notes in found)


@pytest.mark.parametrize("name", ["GantryDetectorTilt", "SliceThickness", "InstanceNumber", "AcquisitionNumber"])
def test_series__an_unimportant_element_that_is_malformed_loses_no_slice(tmp_path, name):
    hu = make_hu(0)
    paths = write_series(tmp_path, hu)
    for path in paths[:2]:
        item = pydicom.dcmread(path)
        setattr(item, name, 1)
        item.save_as(path, enforce_file_format=True)
        data = path.read_bytes()
        tag = pydicom.tag.Tag(name)
        at = data.index(tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little"))
        length = int.from_bytes(data[at + 6 : at + 8], "little")
        path.write_bytes(data[: at + 8] + b"x-y-"[:length] + data[at + 8 + length :])
    ((read, _),) = volumes(tmp_path)
    assert np.array_equal(read, hu)


def test_series__files_without_preamble_and_ending_are_read(tmp_path):
    hu = make_hu(0)
    for path in write_series(tmp_path, hu):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[132:])
    ((read, notes),) = volumes(tmp_path)
    assert np.array_equal(read, hu)
    assert notes == ()
    for path in tmp_path.iterdir():  # without the group of the file itself either
        data = path.read_bytes()
        path.write_bytes(data[data.index(b"\x08\x00\x08\x00") :])
    ((again, notes),) = volumes(tmp_path)
    assert np.array_equal(again, hu)
