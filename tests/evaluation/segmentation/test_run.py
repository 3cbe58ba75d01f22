import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from meddino_evaluation.cli import main
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.segmentation import run as run_module
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import open_experiment
from meddino_evaluation.segmentation.network import state_hash
from meddino_evaluation.segmentation.run import segment
from meddino_evaluation.segmentation.training import Trainer

from meddino.core.config import load_config
from meddino.core.errors import ConfigError, VolumeError

MODEL = "random:vitnano8"


def test_segment__writes_everything_and_learns_something(make_dataset, tiny_config, tmp_path):
    data, out = make_dataset(), tmp_path / "out"
    config = tiny_config(training={"steps": 60, "batch_size": 4, "lr_head": 0.03}, metrics={"surface": True})
    metrics = segment(config, MODEL, data, out)
    assert metrics["test"]["dice"]["mean"] > 0.3
    with (out / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 2  # test cases, labels, seeds
    assert list(rows[0])[:9] == ["case", "label", "dice", "iou", "nsd", "hd95_mm", "assd_mm", "volume_ml_pred", "volume_ml_ref"]
    by_seed = [np.mean([float(row["dice"]) for row in rows if row["seed"] == str(seed)]) for seed in (0, 1)]
    assert metrics["test"]["dice"]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-4)
    assert metrics["test"]["dice"]["std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-4)
    assert metrics["model"]["hash"]
    assert metrics["data"]["hash"]
    case = rows[0]["case"]
    prediction = sitk.ReadImage(str(out / f"predictions/fold-0_seed-0/{case}.nii.gz"))
    image = sitk.ReadImage(str(data / f"imagesTr/{case}_0000.nii.gz"))
    np.testing.assert_allclose(prediction.GetOrigin(), image.GetOrigin(), atol=1e-5)
    assert prediction.GetSize() == image.GetSize()
    assert "Best, median and worst case" in (out / "report.html").read_text()
    assert (out / "splits_final.json").is_file()


def test_segment__same_seed_same_bytes_and_another_seed_other_ones(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    for name, seeds in (("a", [0]), ("b", [0]), ("c", [5])):
        segment(tiny_config(seeds=seeds), MODEL, data, tmp_path / name)
    weights = {name: next((tmp_path / name / "weights").iterdir()).read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]
    assert (tmp_path / "a/cases.csv").read_text() == (tmp_path / "b/cases.csv").read_text()


def test_segment__again_trains_nothing_and_a_changed_setting_trains_anew(make_dataset, tiny_config, tmp_path, monkeypatch):
    data, out = make_dataset(), tmp_path / "out"
    first = segment(tiny_config(), MODEL, data, out)
    trained = []
    original = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, on_step: (trained.append(1), original(self, on_step))[1])
    assert segment(tiny_config(), MODEL, data, out)["test"] == first["test"]
    assert not trained
    segment(tiny_config(training={"lr_head": 0.02}), MODEL, data, out)
    assert len(trained) == 2
    (out / "weights/fold-0_seed-1.safetensors").write_bytes(b"damaged")
    segment(tiny_config(training={"lr_head": 0.02}), MODEL, data, out)
    assert len(trained) == 3


def test_test_cases__are_read_once_and_only_after_all_training(make_dataset, tiny_config, tmp_path, monkeypatch):
    events = []
    read = LabelledDataset.read_images
    fit = Trainer.fit
    monkeypatch.setattr(
        LabelledDataset, "read_images", lambda self, case, channels: (events.append(case.name), read(self, case, channels))[1]
    )
    label = LabelledDataset.read_label
    monkeypatch.setattr(
        LabelledDataset,
        "read_label",
        lambda self, case, grid: (events.append(f"label {case.name}"), label(self, case, grid))[1],
    )
    monkeypatch.setattr(Trainer, "fit", lambda self, on_step: (fit(self, on_step), events.append("trained"))[0])
    config = tiny_config(training={"selection": "best_val", "val_every_steps": 2}, splits={"val_fraction": 0.4})
    segment(config, MODEL, make_dataset(cases=6), tmp_path / "out")
    parts = json.loads((tmp_path / "out/splits.json").read_text())[0]
    assert parts["val"]
    assert parts["test"]
    last = max(index for index, event in enumerate(events) if event == "trained")
    assert events.count("trained") == 2
    for name in parts["test"]:
        assert events.count(name) == 1
        assert events.count(f"label {name}") == 1
        assert events.index(name) > last
    assert not set(parts["test"]) & set(events[: last + 1])


def test_frozen__every_parameter_and_buffer_stays(make_dataset, tiny_config, tmp_path):
    for crops in ("grid", "random"):
        experiment = open_experiment(tiny_config(training={"crops": crops}), MODEL, make_dataset())
        before = state_hash(experiment.source.backbone)
        run_module.train_all(experiment, tmp_path / crops)
        assert state_hash(experiment.source.backbone) == before


def test_finetune__the_encoder_moves_and_the_source_does_not(make_dataset, tiny_config, tmp_path):
    experiment = open_experiment(tiny_config(encoder={"mode": "finetune"}, seeds=[0]), MODEL, make_dataset())
    before = state_hash(experiment.source.backbone)
    run_module.train_all(experiment, tmp_path)
    assert state_hash(experiment.source.backbone) == before
    network = run_module.load_network(experiment, experiment.source, experiment.splits[0], 0, tmp_path)
    assert state_hash(network.backbone) != before


def test_frozen_that_moved__is_a_fault(make_dataset, tiny_config, tmp_path, monkeypatch):
    def drifts(self, on_step):
        with torch.no_grad():
            self.network.backbone.norm.weight += 1

    monkeypatch.setattr(Trainer, "fit", drifts)
    experiment = open_experiment(tiny_config(), MODEL, make_dataset())
    with pytest.raises(RuntimeError, match="the encoder's weights moved"):
        run_module.train_all(experiment, tmp_path)


def test_cached_tokens__give_the_same_weights_as_computing_them_each_step(make_dataset, tiny_config, tmp_path, monkeypatch):
    data, config = make_dataset(), tiny_config(seeds=[0], training={"batch_size": 1})
    segment(config, MODEL, data, tmp_path / "cached")
    monkeypatch.setattr(run_module, "TokenCache", lambda network, machine: None)
    segment(config, MODEL, data, tmp_path / "plain")
    first, second = ((tmp_path / name / "weights/fold-0_seed-0.safetensors").read_bytes() for name in ("cached", "plain"))
    assert first == second


def test_best_val__keeps_the_best_weights(make_dataset, tiny_config, tmp_path):
    config = tiny_config(
        training={"selection": "best_val", "val_every_steps": 2, "steps": 6}, splits={"val_fraction": 0.4}, seeds=[0]
    )
    segment(config, MODEL, make_dataset(cases=6), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/logs/fold-0_seed-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_dice" in line] == [1, 3, 5]


def test_random_of_an_export__has_its_architecture_and_contract(tmp_path):
    from meddino_evaluation.segmentation.encoders import load_encoder

    import meddino

    loaded = load_encoder("random:vitnano8", random_seed=1)
    again, other = load_encoder("random:vitnano8", random_seed=1), load_encoder("random:vitnano8", random_seed=2)
    assert loaded.model_hash == again.model_hash != other.model_hash
    assert loaded.contract == meddino.load("random:vitnano8").contract


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"crop_px": 36}}, "multiple of its patch size 8"),
        ({"encoder": {"taps": 9}}, "this model has 4 blocks"),
        ({"data": {"neighbour_slices": 2}}, "takes 1 .repeated. or 3"),
        ({"splits": {"folds": 9}}, "4 patients allow 2 to 4 folds"),
        ({"splits": {"run_folds": [3]}}, "fold 3 does not exist"),
        ({"labels": {"train_slices": 1000}}, r"labels\.train_slices is 1000"),
        ({"labels": {"train_cases": 7}}, r"labels\.train_cases is 7"),
    ],
)
def test_wrong_settings__one_clear_line(make_dataset, tiny_config, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        segment(tiny_config(**change), MODEL, make_dataset(), tmp_path / "out")


def test_wrong_labels__are_named(make_dataset, tiny_config, tmp_path):
    data = make_dataset(labels={"background": 0, "bright": 1})
    with pytest.raises(VolumeError, match=r"label values \[2\] are not in dataset.json"):
        segment(tiny_config(), MODEL, data, tmp_path / "out")


def test_geometry_mismatch__is_named_before_training(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    path = data / "labelsTr/case_01.nii.gz"
    label = sitk.ReadImage(str(path))
    label.SetOrigin((50.0, 0.0, 0.0))
    sitk.WriteImage(label, str(path))
    with pytest.raises(VolumeError, match="case case_01: image and label map"):
        segment(tiny_config(), MODEL, data, tmp_path / "out")


def test_missing_label__is_named(make_dataset, tiny_config, tmp_path):
    data = make_dataset()
    (data / "labelsTr/case_02.nii.gz").unlink()
    with pytest.raises(VolumeError, match="case case_02: its label map"):
        segment(tiny_config(), MODEL, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere/"], "no such folder or file"),
        (["--model", "random:vitnono8"], "did you mean 'vitnano8'"),
        (["--data", "nowhere"], "no such folder"),
        (["training.stepz=3"], "unknown key 'training.stepz'; did you mean 'steps'"),
        (["training.steps=many"], "training.steps"),
        (["--config", "nosuch"], "no config file 'nosuch'"),
    ],
)
def test_command__wrong_input_exits_2_with_one_line(make_dataset, tmp_path, capsys, arguments, words):
    base = {"--model": MODEL, "--data": str(make_dataset()), "--out": str(tmp_path / "out"), "--config": "demo"}
    given = dict(zip(arguments[::2], arguments[1::2], strict=False)) if arguments[0].startswith("--") else {}
    overrides = [] if given else arguments
    argv = ["segment", *(part for pair in {**base, **given}.items() for part in pair), *overrides]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("meddino-eval: error:")
    assert words in error


@pytest.mark.parametrize("name", ["segment", "demo", "demo_real"])
def test_shipped_configs__are_complete(name):
    from omegaconf import OmegaConf

    from meddino.core.config import find_config

    config = load_config(SegmentConfig, [name], kind="evaluation")
    written = OmegaConf.to_container(OmegaConf.load(find_config(name, "evaluation")))
    assert json.loads(config.model_dump_json()).keys() == written.keys()
    for section, fields in json.loads(config.model_dump_json()).items():
        if isinstance(fields, dict):
            assert fields.keys() == written[section].keys(), section
