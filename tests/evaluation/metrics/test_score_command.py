import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main

from meddino.volumes.read import read_label_map


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


def score(folder: Path, *more: str) -> tuple[int, dict]:
    out = folder / "out"
    code = main(["score", "--pred", str(folder / "pred"), "--ref", str(folder / "ref"), "--out", str(out), *more])
    return code, json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").is_file() else {}


def test_score__failed_cases_are_named_the_others_go_on_and_it_ends_with_2(tmp_path, capsys):
    pred, ref = boxes()
    for name in ("good", "elsewhere", "broken"):
        save(tmp_path / f"ref/{name}.nii.gz", ref)
    save(tmp_path / "pred/good.nii.gz", pred)
    save(tmp_path / "pred/elsewhere.nii.gz", pred, origin=(40.0, 0.0, 0.0))
    (tmp_path / "pred/broken.nii.gz").write_bytes(b"no image")
    code, metrics = score(tmp_path)
    assert code == 2
    assert sorted(metrics["failed"]) == ["broken", "elsewhere"]
    assert "different grids" in metrics["failed"]["elsewhere"]
    assert [row["case"] for row in rows_of(tmp_path / "out")] == ["good"]
    told = capsys.readouterr()
    assert "over 1 of 3 cases; 2 failed" in told.out
    assert "broken, elsewhere" in told.err


def test_score__a_missing_prediction_counts_as_empty_unless_told_to_skip(tmp_path, capsys):
    _, ref = boxes()
    for name in "ab":
        save(tmp_path / f"ref/{name}.nii.gz", ref)
    save(tmp_path / "pred/a.nii.gz", ref)
    code, metrics = score(tmp_path)
    assert (code, metrics["test"]["dice"]["mean"], metrics["counted"]["missing"]) == (0, 0.5, ["b"])
    assert "over 2 of 2 cases; 1 without a prediction count as empty" in capsys.readouterr().out
    code, metrics = score(tmp_path, "--missing", "skip")
    assert (code, metrics["test"]["dice"]["mean"], metrics["counted"]["scored"]) == (0, 1.0, 1)
    assert "over 1 of 2 cases; 1 without a prediction left out" in capsys.readouterr().out


def test_score__a_prediction_without_a_reference_is_told(tmp_path, capsys):
    _, ref = boxes()
    save(tmp_path / "ref/a.nii.gz", ref)
    for name in ("a", "A", "b"):
        save(tmp_path / f"pred/{name}.nii.gz", ref)
    code, metrics = score(tmp_path)
    assert (code, metrics["without_reference"]) == (0, ["A", "b"])
    assert "2 predictions have no reference and are not scored: A, b" in capsys.readouterr().err


@pytest.mark.parametrize("declared", [False, True])
def test_score__an_invented_label_is_a_false_positive(tmp_path, declared):
    _, ref = boxes()
    pred = ref.copy()
    pred[0, 0, 0] = 7
    save(tmp_path / "ref/a.nii.gz", ref)
    save(tmp_path / "ref/b.nii.gz", ref)
    save(tmp_path / "pred/a.nii.gz", pred)
    save(tmp_path / "pred/b.nii.gz", ref)
    if declared:
        (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"background": 0, "1": 1}}))
    code, metrics = score(tmp_path)
    assert code == 0
    assert {(row["case"], row["label"]): row["dice"] for row in rows_of(tmp_path / "out")} == {
        ("a", "1"): "1",
        ("a", "7 (invented)"): "0",
        ("b", "1"): "1",
        ("b", "7 (invented)"): "",
    }
    assert metrics["test"]["dice"]["mean"] == 0.75


@pytest.mark.parametrize("value", [70_000, 2**31 - 1, 2**32 + 1, -(2**32) + 1])
def test_score__label_values_beyond_the_stored_type(tmp_path, value):
    ref = np.zeros((3, 4, 4), dtype=np.int64)
    ref[1] = 1
    save(tmp_path / "ref/a.nrrd", ref)
    image = sitk.GetImageFromArray(ref * value)
    image.SetSpacing((1.0, 1.0, 3.0))
    (tmp_path / "pred").mkdir()
    sitk.WriteImage(image, str(tmp_path / "pred/a.nrrd"))
    if abs(value) < 2**31:
        code, metrics = score(tmp_path)
        assert (code, metrics["test"]["dice"]["mean"], metrics["data"]["labels"]) == (0, 0.0, ["1", f"{value} (invented)"])
        return
    assert score(tmp_path)[0] == 2  # and never label 1


def test_score__two_files_of_one_case_are_refused_and_the_named_one_is_read(tmp_path, capsys):
    _, ref = boxes()
    save(tmp_path / "ref/a.nii", ref)
    save(tmp_path / "pred/a.nii", np.zeros_like(ref))
    save(tmp_path / "pred/a.nii.gz", ref)
    assert score(tmp_path)[0] == 2
    assert "a.nii and a.nii.gz" in capsys.readouterr().err
    for ending, other, voxels in ((".nii", ".nii.gz", np.zeros_like(ref)), (".nii.gz", ".nii", ref)):
        assert np.array_equal(read_label_map(tmp_path / f"pred/a{ending}")[0], voxels), other


def test_score__flipped_predictions_are_compared_in_one_orientation(tmp_path, capsys):
    _, ref = boxes()
    ref[3:5, 5:9, 5:15] = 0  # no symmetry left
    save(tmp_path / "ref/a.nii.gz", ref)
    image = sitk.GetImageFromArray(np.roll(ref, 1, axis=0))
    image.SetSpacing((1.0, 1.0, 3.0))
    (tmp_path / "pred").mkdir()
    sitk.WriteImage(image, str(tmp_path / "pred/a.nii.gz"))
    straight = score(tmp_path)[1]["test"]["dice"]["mean"]
    for letters in ("RAS", "LPI", "PSL"):
        sitk.WriteImage(sitk.DICOMOrient(image, letters), str(tmp_path / "pred/a.nii.gz"))
        code, metrics = score(tmp_path)
        assert (code, metrics["test"]["dice"]["mean"]) == (0, straight)
        assert "directions" in metrics["notes"]["a"]
    wrong = sitk.GetImageFromArray(ref)
    wrong.SetSpacing((1.0, 1.0, 3.0))
    wrong.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # turned where it lies: another place
    sitk.WriteImage(wrong, str(tmp_path / "pred/a.nii.gz"))
    assert score(tmp_path)[0] == 2
    assert "directions differ" in capsys.readouterr().err


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


def slow_dice(pred: np.ndarray, ref: np.ndarray, value: int) -> float | None:
    """Count voxels one after the other; None where neither has the label."""
    mine = theirs = both = 0
    for one, other in zip(pred.ravel().tolist(), ref.ravel().tolist(), strict=True):
        mine, theirs, both = mine + (one == value), theirs + (other == value), both + (one == other == value)
    return 2 * both / (mine + theirs) if mine + theirs else None


@pytest.mark.parametrize("seed", range(6))
def test_score__random_studies_equal_a_slow_implementation(tmp_path, seed):
    # Random label maps, orientations, spacings, formats; labels that are empty or invented; predictions that are missing.
    rng = np.random.default_rng(seed)
    expected, means, references = {}, [], {}
    for number in range(5):
        shape, spacing = tuple(rng.integers(3, 8, 3)), rng.uniform(0.4, 4, 3)
        # The last reference has no label at all, the first has label 1 for certain.
        ref = rng.integers(0, 3, shape) * (number < 4)
        ref.flat[0] = 1 if number == 0 else ref.flat[0]
        pred = np.where(rng.random(shape) < 0.6, ref, rng.integers(0, 5, shape) * (rng.random() < 0.8))
        folder = [tmp_path / "ref", *([tmp_path / "pred"] if number == 0 or rng.random() < 0.7 else [])]
        for place, voxels in zip(folder, (ref, pred), strict=False):
            place.mkdir(exist_ok=True)
            image = sitk.GetImageFromArray(voxels.astype(rng.choice(["uint8", "int16", "int32", "float32"])))
            image.SetSpacing(tuple(spacing.tolist()))
            image.SetOrigin((1.0, -20.0, 3.5))
            image = sitk.DICOMOrient(image, str(rng.choice(["LPS", "RAS", "ASL", "IPR"])))
            sitk.WriteImage(image, str(place / f"c{number}{rng.choice(['.nii', '.nii.gz', '.nrrd', '.mha'])}"))
        references[f"c{number}"] = (pred if len(folder) == 2 else np.zeros_like(ref), ref, float(np.prod(spacing)) / 1000)
    known = sorted({value for _, ref, _ in references.values() for value in np.unique(ref).tolist()} - {0})
    invented = sorted({value for pred, _, _ in references.values() for value in np.unique(pred).tolist()} - {0, *known})
    for case, (pred, ref, voxel_ml) in references.items():
        values = {}
        for value in (*known, *invented):
            name = f"{value}" if value in known else f"{value} (invented)"
            values[name] = slow_dice(pred, ref, value)
            expected[case, name] = (values[name], (pred == value).sum() * voxel_ml, (ref == value).sum() * voxel_ml)
        defined = [one for one in values.values() if one is not None]
        means += [sum(defined) / len(defined)] if defined else []
    code, metrics = score(tmp_path)
    assert code == 0
    found = {(row["case"], row["label"]): row for row in rows_of(tmp_path / "out")}
    assert found.keys() == expected.keys()
    for key, (dice, pred_ml, ref_ml) in expected.items():
        assert (found[key]["dice"] == "") == (dice is None)
        if dice is not None:
            assert float(found[key]["dice"]) == pytest.approx(dice, abs=1e-5)
        assert float(found[key]["volume_ml_pred"]) == pytest.approx(pred_ml, rel=1e-4)
        assert float(found[key]["volume_ml_ref"]) == pytest.approx(ref_ml, rel=1e-4)
    assert metrics["test"]["dice"]["mean"] == pytest.approx(sum(means) / len(means))


def test_score__a_value_that_nothing_declares_is_never_found_right(tmp_path, capsys):
    _, ref = boxes()
    other = ref.copy()
    other[9, 2:6, 2:6] = 2  # forgotten in dataset.json
    half = np.where(np.arange(20) < 10, other, np.where(other == 1, 0, other))
    save(tmp_path / "ref/a.nii.gz", ref)
    save(tmp_path / "ref/b.nii.gz", other)
    for name in "ab":
        save(tmp_path / f"pred/{name}.nii.gz", half)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1}}))
    code, metrics = score(tmp_path)
    assert code == 2 and list(metrics["failed"]) == ["b"]
    assert "label values [2] are not in dataset.json" in metrics["failed"]["b"]
    dice = {row["label"]: float(row["dice"]) for row in rows_of(tmp_path / "out")}
    assert dice["2 (invented)"] == 0.0
    assert dice["x"] == pytest.approx(2 / 3, abs=1e-4)  # half of the box
    assert metrics["test"]["dice"]["mean"] == pytest.approx(dice["x"] / 2)
