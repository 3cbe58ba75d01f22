import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main


def save(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 3.0), origin=(0.0, 0.0, 0.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


def boxes() -> tuple[np.ndarray, np.ndarray]:
    ref = np.zeros((12, 20, 20), dtype=np.uint8)
    ref[3:8, 5:15, 5:15] = 1
    return np.roll(ref, 1, axis=0), ref


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "cases.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_score__two_boxes_by_hand(tmp_path):
    pred, ref = boxes()
    save(tmp_path / "pred/a.nii.gz", pred)
    save(tmp_path / "ref/a.nii.gz", ref)
    out = tmp_path / "out"
    assert main(["score", "--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref"), "--out", str(out)]) == 0
    (row,) = rows_of(out)
    columns = ["case", "label", "dice", "iou", "nsd", "hd95_mm", "assd_mm", "volume_ml_pred", "volume_ml_ref"]
    assert list(row) == [*columns, "volume_difference_ml"]
    assert float(row["volume_difference_ml"]) == 0.0
    assert (row["case"], row["label"], float(row["dice"]), float(row["hd95_mm"])) == ("a", "1", 0.8, 3.0)
    assert float(row["volume_ml_ref"]) == 1.5
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["dice"]["mean"] == pytest.approx(0.8)
    assert metrics["config"]["tolerance_mm"] == 1.0


def test_score__equals_surface_distance(tmp_path):
    surface_distance = pytest.importorskip("surface_distance")
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(1)
    ref = gaussian_filter(rng.normal(size=(10, 30, 30)), 2) > 0.03
    pred = ref ^ (gaussian_filter(rng.normal(size=ref.shape), 1.5) > 0.12)
    save(tmp_path / "pred/a.nii.gz", pred, spacing=(0.8, 0.9, 2.5))
    save(tmp_path / "ref/a.nii.gz", ref, spacing=(0.8, 0.9, 2.5))
    options = ["--out", str(tmp_path / "out"), "--tolerance-mm", "2"]
    assert main(["score", "--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref"), *options]) == 0
    distances = surface_distance.compute_surface_distances(ref, pred, spacing_mm=(2.5, 0.9, 0.8))
    (row,) = rows_of(tmp_path / "out")
    wanted = surface_distance.compute_surface_dice_at_tolerance(distances, 2.0)
    assert float(row["nsd"]) == pytest.approx(wanted, abs=1e-4)
    assert float(row["dice"]) == pytest.approx(surface_distance.compute_dice_coefficient(ref, pred), abs=1e-5)


def test_score__names_regions_and_ignored_voxels_from_dataset_json(tmp_path):
    _, ref = boxes()
    ref[9] = 9
    ref[4, 6:8, 6:8] = 2
    pred = np.where(ref == 9, 1, ref)
    save(tmp_path / "data/labelsTs/a.nii.gz", ref)
    save(tmp_path / "pred/a.nii.gz", pred)
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 9}
    (tmp_path / "data/dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2]}))
    out = tmp_path / "out"
    assert main(["score", "--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "data/labelsTs"), "--out", str(out)]) == 0
    assert {row["label"]: float(row["dice"]) for row in rows_of(out)} == {"whole": 1.0, "core": 1.0}


def test_score__bad_cases_are_named_and_the_others_go_on(tmp_path):
    pred, ref = boxes()
    for name in ("good", "missing", "elsewhere", "broken", "strange"):
        save(tmp_path / f"ref/{name}.nii.gz", ref)
    save(tmp_path / "pred/good.nii.gz", pred)
    save(tmp_path / "pred/elsewhere.nii.gz", pred, origin=(40.0, 0.0, 0.0))
    save(tmp_path / "pred/strange.nii.gz", pred * 7)
    (tmp_path / "pred/broken.nii.gz").write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["score", "--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref"), "--out", str(out)]) == 0
    failed = json.loads((out / "metrics.json").read_text())["failed"]
    assert sorted(failed) == ["broken", "elsewhere", "missing", "strange"]
    assert "different grids" in failed["elsewhere"]
    assert "label values [7]" in failed["strange"]
    assert [row["case"] for row in rows_of(out)] == ["good"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pred", "nowhere"], "--pred nowhere: no such folder"),
        (["--ref", "{tmp}/empty"], "holds no label map"),
        (["--tolerance-mm", "-1"], "must be a positive number"),
        (["--dataset-json", "nowhere.json"], "no such file"),
    ],
)
def test_score__wrong_input_exits_2(tmp_path, capsys, arguments, words):
    pred, ref = boxes()
    save(tmp_path / "pred/a.nii.gz", pred)
    save(tmp_path / "ref/a.nii.gz", ref)
    (tmp_path / "empty").mkdir()
    given = {"--pred": str(tmp_path / "pred"), "--ref": str(tmp_path / "ref"), "--out": str(tmp_path / "out")}
    given[arguments[0]] = arguments[1].format(tmp=tmp_path)
    assert main(["score", *(part for pair in given.items() for part in pair)]) == 2
    assert words in capsys.readouterr().err
