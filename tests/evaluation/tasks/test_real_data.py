"""Each kind of task of which ../shared/data holds something real, from files to numbers; too small to judge a model."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.cli import main

from tests.evaluation.tasks.test_prepare import save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "random:vitnano8"
SMALL = ("training.steps=60", "training.batch_size=8", "training.lr_head=0.01", "splits.folds=3", "metrics.bootstrap=200")
SLICES = ("data.resample=size", "data.size_px=96", "training.crop_px=96", *SMALL)


def run(command, data, out, *settings):
    assert main([command, "--model", MODEL, "--data", str(data), "--out", str(out), "device=cpu", *settings]) == 0
    with (out / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-4)
    return metrics, rows


def test_segment__slices_of_mr_volumes(shared_data, tmp_path):
    data = shared_data / "segmentation/Dataset904_SarcomaMR"
    metrics, rows = run("segment", data, tmp_path, "--config", "minutes", *SLICES, "seeds=[0,1,2]")
    assert (metrics["data"]["modality"], metrics["unit"]) == ("mr", "mm")
    assert len({row["patient"] for row in rows}) == 4 and metrics["test"]["dice"]["mean"] > 0


def test_segment__pictures_beside_masks_made_of_the_largest_slice_of_each_patient(shared_data, tmp_path):
    data, root = shared_data / "segmentation/Dataset901_SarcomaCT", tmp_path / "pictures"
    areas = {}
    for path in sorted((data / "labelsTr").glob("*.nii.gz")):
        name, label = path.name.removesuffix(".nii.gz"), sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0
        z = int(label.sum((1, 2)).argmax())
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(data / f"imagesTr/{name}_0000.nii.gz")))[z]
        save(root / f"images/{name}.png", (hu.clip(-160, 240) + 160) / 400 * 255)
        save(root / f"masks/{name}.png", label[z])
        areas[name] = int(label[z].sum())
    metrics, rows = run("segment", root, tmp_path / "out", "--config", "minutes", *SLICES, "seeds=[0,1,2]")
    assert (metrics["data"]["modality"], metrics["unit"]) == ("image", "px")
    assert all(float(row["area_px_ref"]) == areas[row["case"]] for row in rows)


@pytest.mark.parametrize("kind", ["box", "point"])
def test_prompt__boxes_and_points_on_ct(kind, shared_data, tmp_path):
    data = shared_data / "segmentation/Dataset901_SarcomaCT"
    decoder = ("decoder.mlp_dim=256", "training.steps=60", "training.batch_size=4", "training.lr=1e-3", "seeds=[0]")
    more = ("size_px=64", "splits.folds=3", "metrics.surface=false", f"prompts.kind={kind}")
    metrics, rows = run("prompt", data, tmp_path, *decoder, *more)
    assert metrics["unit"] == "mm" and len({row["patient"] for row in rows}) == 4
    assert metrics["test"]["dice"]["mean"] > 0.3


def test_linear__classes_of_mr_slices_in_lvm_meds_settings(shared_data, tmp_path):
    root = shared_data / "classification/brain_mri"
    words = ["linear", "--model", MODEL, "--data", "brain_mri", "--root", str(root), "--out", str(tmp_path)]
    small = ["features.image_size_px=32", "features.device=cpu", "finetune.epochs=2", "split.repeats=1"]
    assert main([*words, "--config", "lvm_med_classification", *small]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert [one["protocol"] for one in found] == ["linear", "mlp", "finetune", "finetune_mlp"]
    assert max(one["metrics"]["accuracy"]["mean"] for one in found) > 0.4  # three classes of 80
