"""Each task with label maps from its fake copy to its headline; one kind of each in `make test`, all of them marked slow."""

import csv
import json

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.tasks.definition import load_task
from meddino_evaluation.tasks.fake_data import FAKES, make_fake
from meddino_evaluation.tasks.run import run_task
from PIL import Image

MODEL = "random:vitnano8"
QUICK = (
    *("data.size_px=48", "training.crop_px=48", "training.steps=30", "training.batch_size=4", "training.lr_head=0.02"),
    *("encoder.mode=frozen", "head.name=linear", "training.selection=last", "seeds=[0]", "splits.folds=2", "device=cpu"),
    *("metrics.bootstrap=100", "training.crops=grid"),
)


def run_fake(name, tmp_path, *overrides, patients=4):
    make_fake(name, tmp_path / "root", patients)
    run_task(load_task(name), MODEL, tmp_path / "root", tmp_path / "out", (*QUICK, *overrides))
    with (tmp_path / "out/cases.csv").open() as stream:
        return json.loads((tmp_path / "out/metrics.json").read_text()), list(csv.DictReader(stream))


def test_run_task__pictures_are_measured_in_pixels(tmp_path):
    metrics, rows = run_fake("isic2018", tmp_path)
    assert metrics["unit"] == "px" and metrics["headline"]["mean"] > 0.6
    assert list(rows[0])[:7] == ["case", "label", "dice", "iou", "nsd", "hd95_px", "assd_px"]
    assert metrics["test"]["hd95_px"]["mean"] == pytest.approx(np.mean([float(row["hd95_px"]) for row in rows]), rel=1e-4)
    area = sum(float(row["area_px_pred"]) - float(row["area_px_ref"]) for row in rows) / len(rows)
    assert metrics["test"]["area_difference_px"]["mean"] == pytest.approx(area, rel=1e-4)
    assert "HD95 [px]" in (tmp_path / "out/report.html").read_text()
    # Pictures of one's own: what is no picture is named, and the mask of a test case is the one that was measured.
    folder = tmp_path / "root/ISIC2018_Task1-2_Training_Input"
    words = ["predict", "--results", str(tmp_path / "out"), "--input", str(folder), "--out", str(tmp_path / "own")]
    assert main(words) == 0
    own = np.asarray(Image.open(tmp_path / f"own/{rows[0]['case']}.png"))
    assert (own == 1).sum() == float(rows[0]["area_px_pred"])
    assert (tmp_path / f"own/{rows[0]['case']}_overlay.png").is_file()
    table = {row["name"]: row for row in csv.DictReader((tmp_path / "own/predictions.csv").open())}
    assert table["LICENSE.txt"]["status"] == "skipped" and table[rows[0]["case"]]["measured"].endswith(" px")


def test_run_task__sites_that_were_not_trained_on_are_tested_apart(tmp_path):
    metrics, _ = run_fake("prostate_sites", tmp_path, "metrics.surface=false", patients=2)
    assert sorted(metrics["headline_by_site"]) == ["BIDMC", "HK", "RUNMC"]
    assert metrics["headline"]["mean"] > metrics["headline_by_site"]["HK"]["mean"]
    assert metrics["unit"] == "mm" and metrics["data"]["modality"] == "mr"


def test_segment__takes_a_task(tmp_path, capsys):
    make_fake("brats2018", tmp_path / "root", 2)
    words = ["segment", "--task", "brats2018", "--data", str(tmp_path / "root"), "--out", str(tmp_path / "out")]
    settings = [*QUICK, "metrics.surface=false", "training.steps=4"]
    assert main([*words, "--model", MODEL, "--config", "lvm_med_segmentation", *settings]) == 0
    assert "test Dice" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["test"]["by_label"]) == {"necrotic_core", "oedema", "enhancing_tumour"}
    assert json.loads((tmp_path / "out/network.json").read_text())["input_channels"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAKES))
@pytest.mark.parametrize("model", [MODEL, "random:resnet50", "none"])
def test_run_task__every_task_with_a_vision_transformer_a_resnet_and_transunet(name, model, tmp_path, monkeypatch):
    make_fake(name, tmp_path / "root", 4)
    head = {"none": "whole_transunet", MODEL: "primus"}.get(model, "unet")
    # 60 steps and a frozen encoder show that the way is open, not what it is worth.
    overrides = (*QUICK, f"head.name={head}", "training.crops=random", "training.steps=2", "metrics.surface=false")
    size = ("data.size_px=64", "training.crop_px=64")
    run_task(load_task(name), model, tmp_path / "root", tmp_path / "out", (*overrides, *size))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["headline"]["mean"] is not None
