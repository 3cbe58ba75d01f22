"""Each task with label maps from its fake copy to its headline; one kind of each in `make test`, all of them marked slow."""

import csv
import json
import statistics

import numpy as np
import pytest
import torch
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.cli import main
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.tasks.definition import MaskSource, load_task
from meddino_evaluation.tasks.fake_data import LABEL_MAP_FAKES
from meddino_evaluation.tasks.run import run_task
from PIL import Image

from meddino.volumes.dicom.writing import uid_of, write_radiograph
from tests.evaluation.tasks.test_prepare import picture_task, save

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


def check_against_rows(found, rows, metric):
    """Compare a mean and its deviation with a slow loop over cases.csv: labels of a case, cases, seeds."""
    by_seed = []
    for seed in sorted({row["seed"] for row in rows}):
        means = []
        for case in sorted({row["case"] for row in rows}):
            own = [row[metric] for row in rows if (row["case"], row["seed"]) == (case, seed)]
            means += [statistics.fmean(float(text) for text in own if text)] if any(own) else []
        by_seed += [statistics.fmean(means)] if means else []
    if not by_seed:
        assert found["mean"] is None
        return
    assert found["mean"] == pytest.approx(statistics.fmean(by_seed), rel=1e-4, abs=1e-6)
    if len(by_seed) > 1:
        assert found["std"] == pytest.approx(statistics.stdev(by_seed), rel=1e-3, abs=1e-5)
    if "interval_95" in found and None not in found["interval_95"]:
        low, high = found["interval_95"]
        assert low <= found["mean"] <= high


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


def test_segment__takes_a_task_and_every_number_comes_from_its_table(tmp_path, capsys, fake_root):
    words = ["segment", "--task", "brats2018", "--data", str(fake_root("brats2018")), "--out", str(tmp_path / "out")]
    settings = [*QUICK, "training.steps=4", "seeds=[0,1]"]
    assert main([*words, "--model", MODEL, "--config", "lvm_med_segmentation", *settings]) == 0
    assert "test Dice" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["test"]["by_label"]) == {"necrotic_core", "oedema", "enhancing_tumour"}
    with (tmp_path / "out/cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for metric in ("dice", "iou", "nsd", "hd95_mm", "assd_mm", "volume_difference_ml"):
        check_against_rows(metrics["test"][metric], rows, metric)
        for name, part in metrics["test"]["by_label"].items():
            check_against_rows(part[metric], [row for row in rows if row["label"] == name], metric)
    assert json.loads((tmp_path / "out/network.json").read_text())["input_channels"] == 4


@pytest.mark.parametrize("mode", ["frozen", "partial"])
def test_run_task__batch_norms_of_a_held_resnet_are_as_they_came(mode, tmp_path, fake_root, monkeypatch):
    networks = []
    build = Experiment.network
    monkeypatch.setattr(Experiment, "network", lambda *given: networks.append(build(*given)) or networks[-1])
    words = (f"encoder.mode={mode}", "encoder.partial_blocks=1", "training.steps=3", "metrics.surface=false")
    run_fake("isic2018", fake_root("isic2018"), tmp_path / "out", *words, model="random:timm:test_resnet")
    trained = networks[0].backbone
    fresh = load_backbone("random:timm:test_resnet")
    before = {name: value for name, value in fresh.named_buffers() if "running" in name or "batches" in name}
    assert before
    learning = {name for name, one in trained.named_parameters() if one.requires_grad}
    assert bool(learning) == (mode != "frozen")
    held = [name for name in before if not any(one.startswith(name.rsplit(".", 1)[0]) for one in learning)]
    assert held and all(torch.equal(dict(trained.named_buffers())[name], before[name]) for name in held)


@pytest.mark.parametrize("kind", ["dcm", "npz"])
def test_run_task__dicom_and_npz_pictures_with_masks_beside_them(kind, tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "root"
    root.mkdir()
    masks = {}
    for number in range(4):
        name, mask = f"one{number}", np.zeros((40, 48), dtype=bool)
        y, x = rng.integers(5, 20, 2)
        mask[y : y + 14, x : x + 18] = True
        grey, masks[name] = np.clip(70 + 100 * mask + rng.normal(0, 10, mask.shape), 0, 255).astype(np.uint8), mask
        if kind == "dcm":
            elements = {"SOPInstanceUID": uid_of("picture", name), "StudyInstanceUID": uid_of("study", name), "PatientID": name}
            write_radiograph(root / f"{name}.dcm", elements, grey.astype(np.uint16) * 16)
            save(root / f"{name}_mask.png", 255 * mask)
        else:
            np.savez(root / f"{name}.npz", image=grey, mask=mask.astype(np.uint8))
    images = {"grey": "{case}.dcm" if kind == "dcm" else "{case}.npz#image"}
    mask = (
        MaskSource(path="{case}_mask.png", label="a")
        if kind == "dcm"
        else MaskSource(path="{case}.npz#mask", values={"a": (1,)})
    )
    run_task(picture_task(images=images, masks=(mask,)), MODEL, root, tmp_path / "out", QUICK)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    with (tmp_path / "out/cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert metrics["unit"] == "px" and metrics["data"]["modality"] == "image"
    assert {row["case"]: float(row["area_px_ref"]) for row in rows} == {row["case"]: masks[row["case"]].sum() for row in rows}
    assert metrics["headline"]["mean"] > 0.5  # the bright square is where its mask is


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
