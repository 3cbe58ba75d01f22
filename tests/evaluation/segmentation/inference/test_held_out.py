"""The test phase: volumes that cannot be read, and test sets from elsewhere."""

import csv
import json
import shutil

import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main
from meddino_evaluation.segmentation.run import segment

from meddino.core.config import to_yaml
from meddino.core.errors import ConfigError, VolumeError

MODEL = "random:vitnano8"


def halve(path) -> None:
    """Leave the header and half of the voxels."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_unreadable_test_volume__is_named_and_the_others_go_on(make_dataset, tiny_config, tmp_path):
    data, out = make_dataset(), tmp_path / "out"
    config = tiny_config(seeds=[0], training={"steps": 1})
    first = segment(config, MODEL, data, out)
    assert first["failed"] == {}
    good, bad = json.loads((out / "splits.json").read_text())[0]["test"]
    halve(data / f"imagesTr/{bad}_0000.nii.gz")
    metrics = segment(config, MODEL, data, out)
    assert list(metrics["failed"]) == [bad]
    assert "damaged" in metrics["failed"][bad]
    assert metrics["test"]["cases"] == 1
    with (out / "cases.csv").open() as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == {good}
    assert "could not be read" in (out / "report.html").read_text()
    halve(data / f"imagesTr/{good}_0000.nii.gz")
    with pytest.raises(VolumeError, match="no case of test set Dataset001_Blobs could be tested"):
        segment(config, MODEL, data, out)


@pytest.fixture
def elsewhere(make_dataset):
    """Two test sets: one with two sites and a damaged volume, one that lacks a label."""
    several = make_dataset(cases=4, name="Several", spacing=(2.0, 1.2, 1.2))
    (several / "patients.csv").write_text("case,patient,site\ncase_00,a,Ulm\ncase_01,a,Ulm\ncase_02,b,Basel\ncase_03,c,Basel\n")
    halve(several / "imagesTr/case_03_0000.nii.gz")
    one = make_dataset(cases=1, name="One", labels={"background": 0, "bright": 1}, origin=(7.0, 7.0, 7.0))
    label = sitk.ReadImage(str(one / "labelsTr/case_00.nii.gz"))
    sitk.WriteImage(label * sitk.Cast(label == 1, label.GetPixelID()), str(one / "labelsTr/case_00.nii.gz"), True)
    return {"several": several, "one": one}


def test_sets_from_elsewhere__rows_by_set_and_site_in_one_command(make_dataset, tiny_config, elsewhere, tmp_path, capsys):
    config = tiny_config(splits={"run_folds": [0, 1]}, training={"steps": 2})
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    data, out = make_dataset(cases=5), tmp_path / "out"
    tests = [f"--test={name}={folder}" for name, folder in elsewhere.items()]
    arguments = ["--data", str(data), "--config", str(tmp_path / "tiny.yaml"), "--out", str(out)]
    assert main(["segment", "--model", MODEL, *arguments, *tests]) == 0
    shown = capsys.readouterr().out
    assert "left out: case_03" in shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["cases"] == 5
    several = metrics["external"]["several"]
    assert several["test"]["cases"] == 3
    assert {site: part["cases"] for site, part in several["test"]["by_site"].items()} == {"Ulm": 2, "Basel": 1}
    assert list(several["failed"]) == ["case_03"]
    assert list(metrics["external"]["one"]["test"]["by_label"]) == ["bright"]
    with (out / "external/several/cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * 2 * 2  # cases, labels, folds, seeds
    page = (out / "report.html").read_text()
    assert "Test sets from elsewhere" in page
    assert "several, Ulm" in page
    prediction = sitk.ReadImage(str(out / "external/several/predictions/fold-1_seed-0/case_00.nii.gz"))
    assert prediction.GetSpacing() == pytest.approx((1.2, 1.2, 2.0))


def test_compare__has_a_table_for_every_set_from_elsewhere(make_dataset, tiny_config, elsewhere, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config(seeds=[0], training={"steps": 1})))
    models = [f"--model={name}={MODEL}" for name in ("first", "second")]
    arguments = ["--data", str(make_dataset(cases=5)), "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")]
    assert main(["compare", *models, *arguments, f"--test=one={elsewhere['one']}"]) == 0
    assert "one:" in capsys.readouterr().out
    assert "first, frozen" in (tmp_path / "out/comparison-one.csv").read_text()
    assert "Test set one" in (tmp_path / "out/report.html").read_text()


def test_sets_from_elsewhere__what_cannot_be_compared_is_refused(make_dataset, tiny_config, tmp_path):
    data, config = make_dataset(), tiny_config(seeds=[0])

    def refused(folder, words):
        with pytest.raises(ConfigError, match=words):
            segment(config, MODEL, data, tmp_path / "out", tests={"there": folder})

    refused(make_dataset(name="Other", labels={"background": 0, "bright": 2, "dark": 1}), r"its labels \['bright', 'dark'\]")
    refused(data, "is the same image as 'case_.*', which is trained on")
    two = make_dataset(name="Two", cases=1)
    shutil.copy(two / "imagesTr/case_00_0000.nii.gz", two / "imagesTr/case_00_0001.nii.gz")
    content = json.loads((two / "dataset.json").read_text())
    (two / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT", "1": "CT"}}))
    refused(two, "2 image channels, and the networks are trained on 1")
    assert main(["segment", "--model", MODEL, "--data", str(data), "--out", str(tmp_path / "out"), "--test", "nameless"]) == 2


def test_held_out_part__imagests_is_the_test_and_the_fold_selects(make_dataset, tiny_config, tmp_path):
    data, other = make_dataset(cases=4), make_dataset(cases=2, name="Later", origin=(9.0, 9.0, 9.0))
    for kind, end in (("images", "_0000"), ("labels", "")):
        (data / f"{kind}Ts").mkdir()
        for number in range(2):
            shutil.copy(other / f"{kind}Tr/case_0{number}{end}.nii.gz", data / f"{kind}Ts/late_{number}{end}.nii.gz")
    select = {"steps": 2, "selection": "best_val", "val_every_steps": 1}
    config = tiny_config(seeds=[0], training=select, inference={"largest_component": "if_val_better"})
    segment(config, MODEL, data, tmp_path / "out")
    (parts,) = json.loads((tmp_path / "out/splits.json").read_text())
    assert parts["test"] == ["late_0", "late_1"]
    assert len(parts["val"]) == 2
    (fold,) = json.loads((tmp_path / "out/splits_final.json").read_text())
    assert sorted(fold["train"]) == sorted([*parts["train"], *parts["val"]])
    with (tmp_path / "out/cases.csv").open() as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == {"late_0", "late_1"}
