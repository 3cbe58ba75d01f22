"""Whole small runs on data that is not the plain case: regions, ignored voxels, 2.5D, channels, sites, resampling."""

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main
from meddino_evaluation.segmentation.run import segment

from meddino.core.errors import ConfigError

MODEL = "random:vitnano8"
LEARNS = {"steps": 60, "batch_size": 4, "lr_head": 0.03}


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def rewrite(path, change):
    image = sitk.ReadImage(str(path))
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    new.CopyInformation(image)
    sitk.WriteImage(new, str(path))


def test_regions__learned_with_overlap_and_written_as_label_values(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    content = json.loads((data / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "any": [1, 2], "dark": [2]}, "regions_class_order": [1, 2]}
    (data / "dataset.json").write_text(json.dumps(content))
    metrics = segment(tiny_config(training=LEARNS, seeds=[0]), MODEL, data, tmp_path / "out")
    assert metrics["data"]["labels"] == ["any", "dark"]
    assert metrics["test"]["dice"]["mean"] > 0.2
    for path in (tmp_path / "out/predictions/fold-0_seed-0").iterdir():
        assert set(np.unique(read(path))) <= {0, 1, 2}


def test_ignored_voxels__are_never_predicted_and_never_counted(make_dataset, tiny_config, tmp_path):
    data = make_dataset(labels={"background": 0, "bright": 1, "dark": 2, "ignore": 3})
    for path in (data / "labelsTr").iterdir():
        rewrite(path, lambda label: np.where(np.arange(label.shape[2]) < 12, 3, label).astype(np.uint8))
    metrics = segment(tiny_config(training=LEARNS, seeds=[0]), MODEL, data, tmp_path / "out")
    assert metrics["data"]["labels"] == ["bright", "dark"]
    for path in (tmp_path / "out/predictions/fold-0_seed-0").iterdir():
        assert 3 not in read(path)


def test_neighbouring_slices__come_in_as_channels(make_dataset, tiny_config, tmp_path):
    metrics = segment(tiny_config(data={"neighbour_slices": 1}, seeds=[0]), MODEL, make_dataset(), tmp_path / "out")
    assert metrics["test"]["cases"] == 2
    from meddino_evaluation.data.layouts import open_dataset
    from meddino_evaluation.data.prepare import GridRule, prepare_case

    data = open_dataset(tmp_path / "Dataset001_Blobs")
    case = prepare_case(data, data.cases[0], (0,), GridRule())
    middle = case.image(1, 1)
    assert [float((middle[i] - case.image(i)[0]).abs().max()) for i in range(3)] == [0.0, 0.0, 0.0]
    assert float((case.image(0, 1)[0] - case.image(0)[0]).abs().max()) == 0.0  # the end repeats


def _refusal(tmp_path, image, capsys):
    arguments = ["--results", str(tmp_path / "all"), "--input", str(image), "--out", str(tmp_path / "predicted")]
    assert main(["predict", *arguments]) == 2
    return capsys.readouterr().out


def test_several_channels__all_of_them_or_the_first(make_dataset, tiny_config, tmp_path, capsys):
    data = make_dataset()
    for path in list((data / "imagesTr").iterdir()):
        for channel in (1, 2):
            shutil.copy(path, path.with_name(path.name.replace("_0000", f"_{channel:04d}")))
    content = json.loads((data / "dataset.json").read_text())
    content["channel_names"] = {"0": "CT", "1": "CT", "2": "CT"}
    (data / "dataset.json").write_text(json.dumps(content))
    for channels in ("first", "all"):
        segment(tiny_config(data={"channels": channels}, seeds=[0]), MODEL, data, tmp_path / channels)
    # Three equal channels are one channel repeated three times.
    first, all_of_them = (tmp_path / name / "cases.csv" for name in ("first", "all"))
    assert first.read_text() == all_of_them.read_text()
    assert "case_00_0000: 1 channels, the network reads 3" in _refusal(tmp_path, data / "imagesTr/case_00_0000.nii.gz", capsys)
    for path in (data / "imagesTr").glob("*_0002.nii.gz"):
        path.unlink()
    content["channel_names"].pop("2")
    (data / "dataset.json").write_text(json.dumps(content))
    # Two equal channels too, and so are four: the first layer's weights are repeated and scaled.
    segment(tiny_config(data={"channels": "all"}, seeds=[0]), MODEL, data, tmp_path / "two")
    rows, again = (list(csv.DictReader((tmp_path / name / "cases.csv").open())) for name in ("first", "two"))
    assert [float(row["dice"]) for row in again] == pytest.approx([float(row["dice"]) for row in rows], abs=2e-3)
    assert (tmp_path / "two/network.json").is_file()


def test_sites__have_rows_of_their_own(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    lines = ["case,patient,site", *(f"case_{i:02d},p{i},{'Ulm' if i % 2 else 'Bonn'}" for i in range(4))]
    (data / "patients.csv").write_text("\n".join(lines))
    metrics = segment(tiny_config(splits={"run_folds": [0, 1]}, seeds=[0]), MODEL, data, tmp_path / "out")
    assert {name: part["cases"] for name, part in metrics["test"]["by_site"].items()} == {"Bonn": 2, "Ulm": 2}
    assert "By site" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    "resample",
    [{"resample": "spacing", "spacing_mm": 2.0}, {"resample": "size", "size_px": 30}, {"resample": "plan", "plan_px": 28}],
)
def test_resampling__predictions_come_back_on_the_source_grid(make_dataset, tiny_config, tmp_path, resample):
    oblique = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.diag([-1.0, -1.0, 1.0])
    data = make_dataset(direction=oblique)
    segment(tiny_config(data=resample, training=LEARNS, seeds=[0]), MODEL, data, tmp_path / "out")
    for path in (tmp_path / "out/predictions/fold-0_seed-0").iterdir():
        prediction, image = sitk.ReadImage(str(path)), sitk.ReadImage(str(data / f"labelsTr/{path.name}"))
        assert prediction.GetSize() == image.GetSize()
        np.testing.assert_allclose(prediction.GetDirection(), image.GetDirection(), atol=1e-6)
        np.testing.assert_allclose(prediction.GetOrigin(), image.GetOrigin(), atol=1e-5)
        found, wanted = read(path), read(data / f"labelsTr/{path.name}")
        assert 2 * ((found == 1) & (wanted == 1)).sum() / ((found == 1).sum() + (wanted == 1).sum()) > 0.25


def test_volume_without_labels__trains_and_is_left_out_of_means(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    rewrite(data / "labelsTr/case_00.nii.gz", np.zeros_like)
    metrics = segment(tiny_config(splits={"run_folds": [0, 1]}, training=LEARNS, seeds=[0]), MODEL, data, tmp_path / "out")
    assert metrics["test"]["cases"] == 4
    for path in (data / "labelsTr").iterdir():
        rewrite(path, np.zeros_like)
    with pytest.raises(ConfigError, match="none of the 8 training slices holds a label"):
        segment(tiny_config(), MODEL, data, tmp_path / "empty")


def test_timm_backbone__of_any_stride_segments_too(make_dataset, tiny_config, tmp_path):
    config = tiny_config(seeds=[0], training={"steps": 1}, head={"name": "unet"})
    assert segment(config, "random:timm:resnet18", make_dataset(), tmp_path / "out")["test"]["cases"] == 2
