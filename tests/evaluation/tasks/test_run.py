"""Each task with label maps from its fake copy to its headline; one kind of each in `make test`, all of them marked slow."""

import csv
import json

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.tasks.definition import load_task
from meddino_evaluation.tasks.fake_data import LABEL_MAP_FAKES
from meddino_evaluation.tasks.run import run_task
from PIL import Image

MODEL = "random:vitnano8"
QUICK = (
    *("data.size_px=48", "training.crop_px=48", "training.steps=30", "training.batch_size=4", "training.lr_head=0.02"),
    *("encoder.mode=frozen", "head.name=linear", "training.selection=last", "seeds=[0]", "splits.folds=2", "device=cpu"),
    *("metrics.bootstrap=100", "training.crops=grid"),
)


def run_fake(name, root, out, *overrides, model=MODEL):
    run_task(load_task(name), model, root, out, (*QUICK, *overrides))
    with (out / "cases.csv").open() as stream:
        return json.loads((out / "metrics.json").read_text()), list(csv.DictReader(stream))


@pytest.mark.parametrize("name", sorted(set(LABEL_MAP_FAKES) - {"isic2018", "prostate_sites", "brats2018"}))
def test_run_task__goes_from_published_files_to_a_headline(name, tmp_path, fake_root):
    quick = ("training.steps=2", "metrics.surface=false", "data.size_px=32", "training.crop_px=32")
    metrics, rows = run_fake(name, fake_root(name), tmp_path, *quick)
    assert metrics["task"] == name and metrics["headline"]["metric"] == load_task(name).metric
    assert {row["label"] for row in rows} == set(load_task(name).labels)
    by_case = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(float(row[metrics["headline"]["metric"]] or "nan"))
    assert metrics["headline"]["mean"] == pytest.approx(np.mean([np.nanmean(one) for one in by_case.values()]), abs=1e-5)


def test_run_task__pictures_are_measured_in_pixels(tmp_path, fake_root):
    metrics, rows = run_fake("isic2018", fake_root("isic2018"), tmp_path / "out")
    assert metrics["unit"] == "px" and metrics["headline"]["mean"] > 0.6
    assert list(rows[0])[:7] == ["case", "label", "dice", "iou", "nsd", "hd95_px", "assd_px"]
    assert metrics["test"]["hd95_px"]["mean"] == pytest.approx(np.mean([float(row["hd95_px"]) for row in rows]), rel=1e-4)
    area = sum(float(row["area_px_pred"]) - float(row["area_px_ref"]) for row in rows) / len(rows)
    assert metrics["test"]["area_difference_px"]["mean"] == pytest.approx(area, rel=1e-4)
    assert "HD95 [px]" in (tmp_path / "out/report.html").read_text()
    # Pictures of one's own: what is no picture is named, and the mask of a test case is the one that was measured.
    folder = fake_root("isic2018") / "ISIC2018_Task1-2_Training_Input"
    words = ["predict", "--results", str(tmp_path / "out"), "--input", str(folder), "--out", str(tmp_path / "own")]
    assert main(words) == 0
    own = np.asarray(Image.open(tmp_path / f"own/{rows[0]['case']}.png"))
    assert (own == 1).sum() == float(rows[0]["area_px_pred"])
    assert (tmp_path / f"own/{rows[0]['case']}_overlay.png").is_file()
    table = {row["name"]: row for row in csv.DictReader((tmp_path / "own/predictions.csv").open())}
    assert table["LICENSE.txt"]["status"] == "skipped" and table[rows[0]["case"]]["measured"].endswith(" px")


def test_run_task__sites_that_were_not_trained_on_are_tested_apart(tmp_path, fake_root):
    metrics, _ = run_fake("prostate_sites", fake_root("prostate_sites"), tmp_path, "metrics.surface=false")
    assert sorted(metrics["headline_by_site"]) == ["BIDMC", "HK", "RUNMC"]
    assert metrics["headline"]["mean"] > metrics["headline_by_site"]["HK"]["mean"]
    assert metrics["unit"] == "mm" and metrics["data"]["modality"] == "mr"


def test_segment__takes_a_task(tmp_path, capsys, fake_root):
    words = ["segment", "--task", "brats2018", "--data", str(fake_root("brats2018")), "--out", str(tmp_path / "out")]
    settings = [*QUICK, "metrics.surface=false", "training.steps=4"]
    assert main([*words, "--model", MODEL, "--config", "lvm_med_segmentation", *settings]) == 0
    assert "test Dice" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["test"]["by_label"]) == {"necrotic_core", "oedema", "enhancing_tumour"}
    assert json.loads((tmp_path / "out/network.json").read_text())["input_channels"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LABEL_MAP_FAKES))
@pytest.mark.parametrize("model", [MODEL, "random:resnet50", "none"])
def test_run_task__every_task_with_a_vision_transformer_a_resnet_and_transunet(name, model, tmp_path, fake_root):
    head = {"none": "whole_transunet", MODEL: "primus"}.get(model, "unet")
    # Two steps and a frozen encoder show that the way is open, not what it is worth.
    overrides = (*QUICK, f"head.name={head}", "training.crops=random", "training.steps=2", "metrics.surface=false")
    size = ("data.size_px=64", "training.crop_px=64")
    run_task(load_task(name), model, fake_root(name), tmp_path, (*overrides, *size))
    assert json.loads((tmp_path / "metrics.json").read_text())["headline"]["mean"] is not None
