import csv
import io
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from meddino_evaluation.cli import main
from meddino_evaluation.data.inputs import Input
from meddino_evaluation.data.prepare import prepare_volume
from meddino_evaluation.segmentation import predict_command
from meddino_evaluation.segmentation.inference.bundle import load_bundle
from meddino_evaluation.segmentation.overlay import COLOURS
from meddino_evaluation.segmentation.run import segment
from rich.console import Console

from meddino.core.errors import ConfigError
from meddino.volumes.read import read_volume
from tests.data_curation.dicom_files import write_series

MODEL = "random:vitnano8"
# What a DICOM-SEG takes over from its source.
STUDY = dict.fromkeys(("PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName"), "") | {
    "StudyDate": "20200101",
    "StudyTime": "120000",
    "StudyID": "1",
    "SeriesNumber": 1,
    "FrameOfReferenceUID": "1.2.3",
    "PixelSpacing": [1.5, 1.5],
}


@pytest.fixture(scope="module")
def trained(blobs, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    config = tiny_config(data={"intensity": "fingerprint"}, splits={"run_folds": [0, 1]}, training={"steps": 40})
    segment(config, MODEL, blobs, out)
    return blobs, out


def table_of(out):
    with (out / "predictions.csv").open() as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_predict__mixed_inputs_at_any_depth_all_end_in_the_table(trained, tmp_path, capsys):
    data, results = trained
    folder, out = tmp_path / "new", tmp_path / "new" / "predicted"
    images = sorted((data / "imagesTr").iterdir())
    shutil.copytree(data / "imagesTr", folder / "deep" / "er")
    shutil.copy(images[0], folder / "scan_2020.nii.gz")  # two years are no two channels
    shutil.copy(images[1], folder / "scan_2021.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no volume")
    write_series(folder / "dicom" / "a", read(images[2]), series="a")
    write_series(folder / "dicom" / "b", read(images[3]), series="b")
    arguments = ["predict", "--results", str(results), "--input", str(folder), "--out", str(out)]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "7 predicted" not in said.out and "found, or why not" in said.err
    rows = table_of(out)
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        **{f"deep/er/case_0{i}": "predicted" for i in range(4)},
        **dict.fromkeys(("scan_2020", "scan_2021", "dicom/a", "dicom/b"), "predicted"),
        "broken": "refused",
        "notes.txt": "skipped",
    }
    assert "broken.nii.gz" in rows["broken"]["reason"]
    assert rows["dicom/a"]["patient"] == "P1"
    assert (out / "predictions.csv").stat().st_mode & 0o77 == 0
    for row in rows.values():
        assert (out / row["output"]).exists() and (out / row["picture"]).exists()
    assert "bright" in rows["dicom/a"]["measured"] and " ml" in rows["dicom/a"]["measured"]
    for path in (results / "predictions/fold-0_seed-0").iterdir():
        np.testing.assert_array_equal(read(path), read(out / "deep/er" / path.name))
        assert sitk.ReadImage(str(path)).GetOrigin() == sitk.ReadImage(str(out / "deep/er" / path.name)).GetOrigin()
    (folder / "broken.nii.gz").unlink()
    assert main(arguments) == 0
    assert set(status) - set(table_of(out)) == {"broken"}  # and nothing of the output was taken for input


def test_end_table__labels_have_the_colours_of_the_pictures():
    stream = io.StringIO()
    screen = Console(file=stream, force_terminal=True, color_system="truecolor", width=120)
    found = Input("one", (), status="predicted", measured={"bright": "2 ml", "dark": "1 ml"}, notes="a note")
    screen.print(predict_command.end_table([found, Input("two", (), status="refused", reason="why not")]))
    said = stream.getvalue()
    for place, words in enumerate(("bright 2 ml", "dark 1 ml")):
        assert f"38;2;{';'.join(f'{value:.0f}' for value in COLOURS[place])}m{words}" in said
    assert "a note" in said and "why not" in said


def test_predict__goes_on_where_it_was_stopped_and_only_there(trained, tmp_path, monkeypatch):
    data, results = trained
    folder, out, predicted = shutil.copytree(data / "imagesTr", tmp_path / "new"), tmp_path / "out", []
    one = predict_command.predict_one

    def stopped(item, *more):
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(item.name)
        return one(item, *more)

    arguments = ["predict", "--results", str(results), "--input", str(folder), "--out", str(out)]
    monkeypatch.setattr(predict_command, "predict_one", stopped)
    assert main(arguments) == 130
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert len(first) == len(predicted) == 2
    shutil.copy(folder / "case_03_0000.nii.gz", folder / "case_01_0000.nii.gz")  # another image under a name that is done
    monkeypatch.setattr(predict_command, "predict_one", lambda item, *more: predicted.append(item.name) or one(item, *more))
    assert main(arguments) == 0
    assert predicted[2:] == ["case_01", "case_02", "case_03"]
    assert (out / "case_00.nii.gz").stat().st_mtime_ns == first["case_00.nii.gz"]
    assert {row["status"] for row in table_of(out).values()} == {"predicted"}
    np.testing.assert_array_equal(read(out / "case_01.nii.gz"), read(out / "case_03.nii.gz"))
    assert main([*arguments, "--fold", "1"]) == 0
    assert len(predicted) == 2 + 3 + 4  # of other networks, and a finished command, nothing is taken over


def test_predict__takes_the_ct_of_a_study_and_says_why_not_the_mr(trained, tmp_path, capsys):
    data, results = trained
    volume = read(sorted((data / "imagesTr").iterdir())[0])
    write_series(tmp_path / "study/ct", volume, series="a")
    write_series(tmp_path / "study/mr", volume, series="b", SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR")
    arguments = ["predict", "--results", str(results), "--out", str(tmp_path / "out"), "--input"]
    assert main([*arguments, str(tmp_path / "study")]) == 0
    rows = table_of(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {"ct": "predicted", "mr": "skipped"}
    assert rows["mr"]["reason"] == "it is MR, and the networks read CT"
    assert "bright" in capsys.readouterr().err  # the table at the end
    assert main([*arguments, str(tmp_path / "study/mr")]) == 2
    assert "no CT among the input" in capsys.readouterr().err


def test_predict__an_ensemble_is_the_mean_of_all_probabilities(trained, tmp_path):
    data, results = trained
    image = data / "imagesTr" / "case_00_0000.nii.gz"
    arguments = ["predict", "--results", str(results), "--input", str(image), "--out", str(tmp_path)]
    assert main([*arguments, "--fold", "all", "--seed", "0", "1"]) == 0
    bundle = load_bundle(results, None, None)
    assert bundle.size == 4
    volume = read_volume(image)
    every = []
    for member, rule in zip(bundle.members, bundle.rules, strict=True):
        case = prepare_volume("case", volume.voxels[None], volume.geometry, rule)
        every += [one.softmax(1) for one in member.logits(case, range(len(volume.voxels)))]
    wanted = torch.stack(every).mean(0).argmax(1)
    turned = case.to_source(wanted.numpy())
    np.testing.assert_array_equal(read(tmp_path / "case_00_0000.nii.gz"), turned)
    assert main([*arguments, "--fold", "some"]) == 2


def test_predict__dicom_series_to_dicom_seg(trained, tmp_path):
    pytest.importorskip("highdicom")
    data, results = trained
    name = sorted(path.name for path in (data / "imagesTr").iterdir())[0]
    volume = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "imagesTr" / name)))
    write_series(tmp_path / "dicom/deep/er", volume, [f"{z:03d}.dcm" for z in range(len(volume))], **STUDY)
    out = tmp_path / "predicted"
    arguments = ["predict", "--results", str(results), "--input", str(tmp_path / "dicom")]
    assert main([*arguments, "--out", str(out), "--format", "dicomseg"]) == 0
    assert main([*arguments, "--out", str(out)]) == 0
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "deep/er.nii.gz")))
    assert labels.any()
    found = pydicom.dcmread(out / "deep/er.dcm")
    assert found.Modality == "SEG"
    assert (
        found.ReferencedSeriesSequence[0].SeriesInstanceUID
        == pydicom.dcmread(tmp_path / "dicom/deep/er/000.dcm").SeriesInstanceUID
    )
    # ITK, on which many viewers stand, decodes the frames, and each says where its slice lies.
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "deep/er.dcm")))
    assert int((frames > 0).sum()) == int((labels > 0).sum())
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert list(measures.PixelSpacing) == [1.5, 1.5]
    for frame, group in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        z = round(float(group.PlanePositionSequence[0].ImagePositionPatient[2]) / 5.0)
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        name = found.SegmentSequence[segment - 1].SegmentLabel
        np.testing.assert_array_equal(frame > 0, labels[z] == {"bright": 1, "dark": 2}[name])
    import highdicom as hd

    seg = hd.seg.segread(out / "deep/er.dcm")
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
        ({"--seed": "7"}, "seeds [7]"),
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


def test_dicom_seg__a_label_keeps_its_number_when_another_is_not_found(tmp_path):
    pytest.importorskip("highdicom")
    from meddino.volumes.dicom.segmentation import write_dicom_seg

    files = write_series(tmp_path / "series", np.zeros((3, 8, 8), dtype=np.int16), **STUDY)
    full, empty = np.zeros((3, 8, 8), dtype=bool), np.zeros((3, 8, 8), dtype=bool)
    full[1, 2:5, 2:5] = True
    for name, masks in {"second": (empty, full, empty), "none": (empty, empty, empty), "last": (empty, empty, full)}.items():
        write_dicom_seg(tmp_path / f"{name}.dcm", dict(zip(("liver", "spleen", "tumour"), masks, strict=True)), files, "1")
        found = pydicom.dcmread(tmp_path / f"{name}.dcm")
        numbers = [(item.SegmentNumber, item.SegmentLabel) for item in found.SegmentSequence]
        assert numbers == [(1, "liver"), (2, "spleen"), (3, "tumour")]
        frames = [g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in found.PerFrameFunctionalGroupsSequence]
        if name != "none":
            assert frames == [{"second": 2, "last": 3}[name]]


@pytest.mark.parametrize(("flat", "name"), [(False, "a.nii.gz"), (True, "a.png")])
def test_check_outputs__neither_the_input_nor_files_of_others_are_written_over(tmp_path, flat, name):
    scans, out = tmp_path / "scans", tmp_path / "out"
    for folder in (scans, out):
        folder.mkdir()
    (scans / name).touch()
    given = [Input("a", (scans / name,))]
    with pytest.raises(ConfigError, match="take the place of the input"):
        predict_command.check_outputs(given, scans, "nifti", flat)
    predict_command.check_outputs(given, out, "nifti", flat)
    (out / name).touch()  # somebody's own label map
    with pytest.raises(ConfigError, match=f"{name} is there already"):
        predict_command.check_outputs(given, out, "nifti", flat)
    (out / "predictions.csv").touch()  # what an earlier call has written is written anew
    predict_command.check_outputs(given, out, "nifti", flat)


def test_predict__beside_its_input_exits_2_and_leaves_it_alone(trained, tmp_path, capsys):
    data, results = trained
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(data / "imagesTr" / "case_00_0000.nii.gz", scan)
    before = scan.read_bytes()
    assert main(["predict", "--results", str(results), "--input", str(scan), "--out", str(tmp_path)]) == 2
    assert "take the place of the input" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"] and scan.read_bytes() == before
