import json
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main
from meddino_evaluation.segmentation.run import segment
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

MODEL = "random:vitnano8"


def write_series(folder, volume: np.ndarray, spacing=(3.0, 1.5, 1.5)) -> None:
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for z, rows in enumerate(volume):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "1", "Test", "", ""
        data.StudyDate, data.StudyTime, data.AccessionNumber, data.StudyID = "20200101", "120000", "", "1"
        data.ReferringPhysicianName, data.Modality, data.SeriesNumber, data.InstanceNumber = "", "CT", 1, z + 1
        data.ImagePositionPatient = [0.0, 0.0, z * spacing[0]]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        data.Rows, data.Columns = rows.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope = 0, 1
        data.PixelData = rows.astype("<i2").tobytes()
        data.save_as(folder / f"{z:03d}.dcm", enforce_file_format=True)


@pytest.fixture
def trained(make_dataset, tiny_config, tmp_path):
    data, out = make_dataset(), tmp_path / "results"
    segment(tiny_config(seeds=[0], data={"intensity": "fingerprint"}), MODEL, data, out)
    return data, out


def test_predict__folder_equals_what_segment_predicted_and_bad_files_do_not_stop_it(trained, tmp_path, capsys):
    data, results = trained
    folder = tmp_path / "new"
    shutil.copytree(data / "imagesTr", folder)
    (folder / "zz_broken_0000.nii.gz").write_bytes(b"no image")
    out = tmp_path / "predicted"
    assert main(["predict", "--results", str(results), "--input", str(folder), "--out", str(out)]) == 0
    assert "4 volumes predicted, 1 could not be read" in capsys.readouterr().out
    assert list(json.loads((out / "failed.json").read_text())) == ["zz_broken"]
    for path in (results / "predictions/fold-0_seed-0").iterdir():
        first, second = (sitk.ReadImage(str(folder / path.name)) for folder in (path.parent, out))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
        assert first.GetOrigin() == second.GetOrigin()


def test_predict__dicom_series_to_dicom_seg(trained, tmp_path):
    pytest.importorskip("highdicom")
    data, results = trained
    name = sorted(path.name for path in (data / "imagesTr").iterdir())[0]
    volume = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "imagesTr" / name)))
    write_series(tmp_path / "dicom/deep/er", volume)
    out = tmp_path / "predicted"
    arguments = ["predict", "--results", str(results), "--input", str(tmp_path / "dicom")]
    assert main([*arguments, "--out", str(out), "--format", "dicomseg"]) == 0
    assert main([*arguments, "--out", str(out)]) == 0
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "series_000.nii.gz")))
    assert labels.any()
    found = pydicom.dcmread(out / "series_000.dcm")
    assert found.Modality == "SEG"
    assert (
        found.ReferencedSeriesSequence[0].SeriesInstanceUID
        == pydicom.dcmread(tmp_path / "dicom/deep/er/000.dcm").SeriesInstanceUID
    )
    # ITK, on which many viewers stand, decodes the frames, and each says where its slice lies.
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "series_000.dcm")))
    assert int((frames > 0).sum()) == int((labels > 0).sum())
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert list(measures.PixelSpacing) == [1.5, 1.5]
    for frame, group in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        z = round(float(group.PlanePositionSequence[0].ImagePositionPatient[2]) / 3.0)
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        name = found.SegmentSequence[segment - 1].SegmentLabel
        np.testing.assert_array_equal(frame > 0, labels[z] == {"bright": 1, "dark": 2}[name])
    import highdicom as hd

    seg = hd.seg.segread(out / "series_000.dcm")
    names = {item.SegmentLabel: item.SegmentNumber for item in found.SegmentSequence}
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sorted((tmp_path / "dicom/deep/er").iterdir())]
    pixels = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    for value, label in ((1, "bright"), (2, "dark")):
        if (labels == value).any():
            np.testing.assert_array_equal(pixels[..., names[label] - 1] > 0, labels == value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--results": "nowhere"}, "no finished run"),
        ({"--seed": "7"}, "not fold 0, seed 7"),
        ({"--input": "nowhere"}, "no such file or folder"),
        ({"--model": "random:vitt16"}, "has other weights than the one"),
        ({"--format": "dicomseg"}, "needs DICOM series as input"),
    ],
)
def test_predict__wrong_input_exits_2(trained, tmp_path, capsys, change, words):
    data, results = trained
    given = {"--results": str(results), "--input": str(data / "imagesTr"), "--out": str(tmp_path / "p"), **change}
    assert main(["predict", *(part for pair in given.items() for part in pair)]) == 2
    assert words in capsys.readouterr().err
