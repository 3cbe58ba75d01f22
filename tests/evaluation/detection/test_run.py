import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from meddino_data_curation.cli import main as curate
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.classification.results import finite
from meddino_evaluation.cli import main
from meddino_evaluation.detection import training
from meddino_evaluation.detection.config import DataConfig, DetectConfig, MetricsConfig
from meddino_evaluation.detection.dataset import Pictures, open_detection, read_image
from meddino_evaluation.detection.metrics import summarise
from meddino_evaluation.detection.run import choose_splits, read_per_case
from meddino_evaluation.detection.training import mirrored
from PIL import Image

from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from tests.evaluation.detection.conftest import QUICK, write_boxes, write_table


def detect(data, out, *more, model="random:vitnano8"):
    return main(["detect", "--model", model, "--data", str(data), "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def finished(table_set, tmp_path_factory):
    """Results of two repeats with a frozen backbone, and the order in which images were looked at."""
    out, seen = tmp_path_factory.mktemp("results"), []
    with pytest.MonkeyPatch.context() as patch:
        plain, saved = Pictures.__call__, training.save_state
        patch.setattr(Pictures, "__call__", lambda self, case: (seen.append(case.name), plain(self, case))[1])
        patch.setattr(training, "save_state", lambda path, *rest: (seen.append("saved " + path.suffix), saved(path, *rest)))
        assert detect(table_set, out, "encoder.mode=frozen", "split.repeats=2") == 0
    return out, seen


def test_detect__end_to_end_with_tables_pictures_and_report(finished):
    out, _ = finished
    content = json.loads((out / "metrics.json").read_text())
    assert content["headline"]["metric"] == "ap50"
    assert set(content["metrics"]) >= {"ap50", "ap50_95", "sensitivity", "sensitivity_at_0.5"}
    assert content["data"]["patients"] == 10
    for name in ("results.csv", "results.md", "results.tex", "by_class.csv", "report.html", "pictures/froc.png", "config.yaml"):
        assert (out / name).stat().st_size > 50, name
    assert "data:image/png;base64" in (out / "report.html").read_text()


def test_detect__every_number_comes_from_the_per_case_table(finished):
    out, _ = finished
    content = json.loads((out / "metrics.json").read_text())
    classes = content["data"]["classes"]
    settings = MetricsConfig.model_validate(
        content["config"]["metrics"] | {"froc_rates": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)}
    )
    again = finite(summarise(read_per_case(out / "per_case.csv", classes), classes, settings, 0))
    assert again["metrics"] == content["metrics"]
    assert again["by_class"] == content["by_class"]
    with (out / "per_case.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    tested = {(row["repeat"], row["image"]) for row in rows if row["kind"] == "image"}
    for repeat in (0, 1):
        split = json.loads((out / f"splits/split-{repeat}.json").read_text())
        assert {image for number, image in tested if number == str(repeat)} == set(split["test"])


def test_detect__the_test_part_is_looked_at_only_after_training(finished):
    out, seen = finished
    trained = [place for place, what in enumerate(seen) if what == "saved .safetensors"]
    for repeat, (start, end) in enumerate(((0, trained[0]), (trained[0], trained[1]))):
        split = json.loads((out / f"splits/split-{repeat}.json").read_text())
        learned_from = {what for what in seen[start:end] if not what.startswith("saved")}
        earlier = set(json.loads((out / "splits/split-0.json").read_text())["test"]) if repeat else set()
        assert not (learned_from - earlier) & set(split["test"])
    assert set(json.loads((out / "splits/split-1.json").read_text())["test"]) <= set(seen[trained[1] :])


def test_detect__what_is_trained_is_taken_up_again(finished, table_set, tmp_path, monkeypatch):
    out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(training.FitLoop, "fit", lambda *_: pytest.fail("trained again"))
    assert detect(table_set, tmp_path / "out", "encoder.mode=frozen", "split.repeats=2") == 0
    assert (tmp_path / "out/per_case.csv").read_bytes() == (out / "per_case.csv").read_bytes()


@pytest.mark.slow
def test_detect__a_training_that_was_killed_goes_on_and_ends_the_same(finished, table_set, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["encoder.mode=frozen", "training.epochs=2"]
    assert detect(table_set, whole, *more) == 0
    plain, looks = training.val_ap50, []

    def once(*arguments):
        looks.append(1)
        if len(looks) == 2:
            raise MedDINOError("killed")
        return plain(*arguments)

    monkeypatch.setattr(training, "val_ap50", once)
    assert detect(table_set, killed, *more) == 2
    assert (killed / "weights/repeat-0.progress").is_file()
    monkeypatch.setattr(training, "val_ap50", plain)
    assert detect(table_set, killed, *more) == 0
    assert (killed / "per_case.csv").read_bytes() == (whole / "per_case.csv").read_bytes()


def test_detect__bad_input_is_one_line_with_names(table_set, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(table_set, root)
    rows = list(csv.DictReader((root / "boxes.csv").open()))

    def refused(changed, *words):
        write_table(root / "boxes.csv", changed)
        assert detect(root, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert all(word in error for word in words), error

    outside = [dict(row) for row in rows]
    outside[1]["x2"] = "70"
    refused(outside, "1 boxes lie outside", "line 3", "64 x 64 px of 01.png")
    Image.new("L", (64, 64), 7).save(root / "empty.png")
    refused([*rows, rows[0] | {"image": "empty.png"}], "empty.png is constant")
    refused([*rows, rows[0] | {"image": "02.png", "patient": "other"}], "02.png", "another patient")
    write_table(root / "boxes.csv", rows)
    assert detect(root, tmp_path / "out", "data.classes=[grey,violet]") == 2
    assert "no box of class violet" in capsys.readouterr().err
    shutil.copy(root / "00.png", root / "twin.png")
    write_table(root / "boxes.csv", [*rows, rows[0] | {"image": "twin.png", "patient": "other"}])
    names = [row["image"] for row in rows]
    split = {"train": names[:12], "val": names[12:16], "test": ["twin.png", *names[16:]]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert detect(root, tmp_path / "out", f"split.file={tmp_path / 'split.json'}") == 2
    assert "'twin.png' in test is the same image as '00.png' in train" in capsys.readouterr().err


def test_pictures__mixed_modalities_are_named(table_set, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(table_set, root)
    from pydicom.data import get_testdata_file

    shutil.copy(get_testdata_file("CT_small.dcm"), root / "ct.dcm")
    rows = [*csv.DictReader((root / "boxes.csv").open()), dict.fromkeys(("x1", "y1", "x2", "y2", "label"), "")]
    rows[-1] |= {"image": "ct.dcm", "patient": "q"}
    write_table(root / "boxes.csv", rows)
    dataset = open_detection(str(root), None, DataConfig())
    with pytest.raises(ConfigError, match=r"mixes modalities: CT: 1 images such as ct\.dcm; brightness: 20"):
        Pictures(load_backbone("random:vitnano8"), dataset, DataConfig(image_size_px=64)).check(dataset.cases)


def test_pictures__a_dicom_slice_keeps_its_window_its_shape_and_its_boxes(tmp_path):
    from pydicom.data import get_testdata_file

    shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "ct.dcm")
    write_table(
        tmp_path / "b.csv", [{"image": "ct.dcm", "x1": 10, "y1": 20, "x2": 64, "y2": 100, "label": "a", "patient": "p"}]
    )
    dataset = open_detection(str(tmp_path), None, DataConfig())
    assert dataset.modality == "ct"
    backbone = load_backbone("random:vitnano8")
    sample = Pictures(backbone, dataset, DataConfig(image_size_px=64))(dataset.cases[0])
    assert sample.image.shape == (backbone.contract.channels, 64, 64)
    assert sample.boxes.tolist() == [[5, 10, 32, 50]]
    assert sample.size_px == (128, 128)


def test_pictures__longer_side_fills_the_input_and_boxes_follow(tmp_path):
    pixels = np.zeros((30, 60), dtype=np.uint8)
    pixels[10:20, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write_table(
        tmp_path / "b.csv", [{"image": "a.png", "x1": 20, "y1": 10, "x2": 40.5, "y2": 20, "label": "a", "patient": "p"}]
    )
    dataset = open_detection(str(tmp_path), None, DataConfig())
    sample = Pictures(load_backbone("random:vitnano8"), dataset, DataConfig(image_size_px=120))(dataset.cases[0])
    assert sample.boxes.tolist() == [[40, 20, 81, 40]]
    assert torch.equal(sample.image[:, 60:], sample.image[:, :1, :1].expand(-1, 60, 120))  # black below
    turned = mirrored(sample)
    assert turned.boxes.tolist() == [[39, 20, 80, 40]]
    assert torch.equal(mirrored(turned).image, sample.image)


def test_read_image__slices_of_a_volume_by_number(tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(0, 50, (4, 8, 8)).astype(np.float32))
    volume = read_image(f"{tmp_path}/v.npy#2", "ct")
    assert volume.values.shape == (1, 1, 8, 8)
    with pytest.raises(VolumeError, match="slices 0 to 3"):
        read_image(f"{tmp_path}/v.npy#9", "ct")
    with pytest.raises(VolumeError, match="name one of them"):
        read_image(f"{tmp_path}/v.npy", "ct")


def overlapping_set(kind, root):
    """A set of 12 images of 6 patients, and below scans/ in another guise of file those of two patients."""
    rng = np.random.default_rng(0)
    (root / "scans").mkdir()
    rows = []
    for patient in range(6):
        values = np.clip(rng.normal(90, 25, (2, 64, 64)), 1, 254)
        values[:, 20:40, 10:30] = 230
        if kind == "image":
            names = [f"p{patient}_{z}.png" for z in (0, 1)]
            for z, name in enumerate(names):
                Image.fromarray(values[z].astype(np.uint8)).save(root / name)
                if patient < 2:
                    Image.fromarray(values[z].astype(np.uint8)).save(root / "scans" / f"{patient}_{z}.tif")
        else:
            names = [f"scan{patient}.nii.gz#{z}" for z in (0, 1)]
            image = sitk.GetImageFromArray(((values - 90) * 8 - 200 if kind == "ct" else values * 4).astype(np.int16))
            sitk.WriteImage(image, str(root / f"scan{patient}.nii.gz"))
            if patient < 2:
                turned = sitk.DICOMOrient(sitk.Cast(image, sitk.sitkFloat32) if kind == "ct" else image, "RAS")
                sitk.WriteImage(turned, str(root / f"scans/{patient}.nrrd"))
        box = dict(zip(("x1", "y1", "x2", "y2"), (10, 20, 30, 40), strict=True))
        rows += [{"image": name, "label": "a", "patient": f"p{patient}", **box} for name in names]
    write_table(root / "boxes.csv", rows)
    return [row["image"] for row in rows[:4]]


@pytest.mark.parametrize("kind", ["ct", "mr", "image"])
def test_detect__images_of_the_pretraining_corpus_are_refused_by_name_or_said(kind, tmp_path, capsys):
    seen = overlapping_set(kind, tmp_path)
    (tmp_path / "sources.yaml").write_text(f"sources: [{{name: own, path: {tmp_path / 'scans'}, modality: {kind}}}]\n")
    (tmp_path / "salt").write_text("tests only\n")
    words = [
        "build",
        "--config",
        tmp_path / "sources.yaml",
        "--out",
        tmp_path / "corpus",
        f"privacy.salt_file={tmp_path / 'salt'}",
    ]
    assert (
        curate([*map(str, words), "slices.min_size_px=8", "slices.min_body_fraction=0", "duplicates.near=false", "workers=1"])
        == 0
    )
    capsys.readouterr()
    words = [tmp_path / "boxes.csv", tmp_path / "out", f"split.corpus={tmp_path / 'corpus'}", f"data.modality={kind}"]
    assert detect(*words) == 2
    error = capsys.readouterr().err
    assert f"4 of 12 images were seen (without boxes) in pretraining: {', '.join(seen[:3])}" in error
    if kind == "ct":
        assert detect(*words, "split.allow_pretraining_overlap=true") == 0
        content = json.loads((tmp_path / "out/metrics.json").read_text())
        assert any("4 of 12 images were seen" in note for note in content["notes"])
        assert content["leakage"]["test_cases_in_pretraining"] == seen


def test_choose_splits__patients_on_two_sides_are_refused(table_set, tmp_path):
    dataset = open_detection(str(table_set), None, DataConfig())
    names = [case.name for case in dataset.cases]
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": names[:9], "val": names[9:12], "test": names[12:]}))
    config = DetectConfig.model_validate({"split": {"file": path}})
    with pytest.raises(ConfigError, match="p4"):
        choose_splits(dataset, config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lungdx__one_patient_is_overfitted_and_the_table_says_so(shared_data, tmp_path):
    boxes = json.loads((shared_data / "detection/lungdx/Lung_Dx-A0001_B_boxes.json").read_text())
    volume = shared_data / "ct/lungdx/Lung_Dx-A0001_B_256.nii.gz"
    write_table(
        tmp_path / "boxes.csv",
        [
            {"image": f"{volume}#{one['slice']}", "label": "tumour", "patient": "A0001"}
            | dict(zip(("x1", "y1", "x2", "y2"), (corner / 2 for corner in one["xyxy512"]), strict=True))
            for one in boxes
        ],
    )
    more = ["overfit=true", "data.image_size_px=256", "training.epochs=60", "training.batch_size=3", "training.lr=1e-3"]
    more += ["detector.pyramid_channels=64", "detector.box_head_width=128", "encoder.mode=frozen", "training.flip=false"]
    more += ["training.val_every_epochs=20", "detector.anchor_strides=8"]
    assert detect(tmp_path / "boxes.csv", tmp_path / "out", *more, model="random:timm:resnet18") == 0
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    assert content["headline"]["mean"] > 0.9
    assert content["overfit"]
    assert "no result" in content["notes"][0]
    assert "(overfit)" in Path(tmp_path / "out/results.md").read_text()


def test_pictures__what_reading_left_out_is_told(tmp_path):
    write_boxes(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 3
    with Image.open(tmp_path / "00.png") as picture:
        picture.save(tmp_path / "00.png", exif=turned)
    dataset = open_detection(str(tmp_path / "boxes.csv"), None, DataConfig())
    pictures = Pictures(load_backbone("random:vitnano8"), dataset, DataConfig(image_size_px=64))
    pictures.check(dataset.cases)
    (line,) = pictures.notes.lines()
    assert line.startswith("1 images, 00") and "EXIF orientation 3 is not applied" in line
