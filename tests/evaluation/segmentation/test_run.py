import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from meddino_evaluation.adaptation.fitting import FitLoop
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.cli import main
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.segmentation import run as run_module
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import open_experiment
from meddino_evaluation.segmentation.run import segment
from meddino_evaluation.segmentation.segment_command import default_config
from meddino_evaluation.segmentation.training.fitting import Fitting, load_network, weights_path
from meddino_evaluation.segmentation.training.samples import CropSampler

from meddino.core.config import load_config
from meddino.core.errors import ConfigError, VolumeError
from tests.browser import check_page

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
    found = check_page(out / "report.html")
    assert set(found["rows"]) == {1} and len(found["pictures"]) == 2 + 2 * 2 + 1  # cases, two cases in pictures, training


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
    original = FitLoop.fit
    monkeypatch.setattr(FitLoop, "fit", lambda self, *arguments: (trained.append(1), original(self, *arguments))[1])
    assert segment(tiny_config(), MODEL, data, out)["test"] == first["test"]
    assert not trained
    segment(tiny_config(training={"lr_head": 0.02}), MODEL, data, out)
    assert len(trained) == 2
    (out / "weights/fold-0_seed-1.safetensors").write_bytes(b"damaged")
    segment(tiny_config(training={"lr_head": 0.02}), MODEL, data, out)
    assert len(trained) == 3


def test_segment__networks_are_those_of_their_own_fold(make_dataset, tiny_config, tmp_path, monkeypatch):
    """Swapped folds, or two cases that turn out to be one patient's: an old network would be tested on what it learnt from."""
    data, out = make_dataset(), tmp_path / "out"
    trained = []
    original = FitLoop.fit
    monkeypatch.setattr(FitLoop, "fit", lambda self, *arguments: (trained.append(1), original(self, *arguments))[1])

    def trainings(**splits: object) -> int:
        trained.clear()
        segment(tiny_config(seeds=[0], splits={"folds": 2, **splits}), MODEL, data, out)
        return len(trained)

    assert trainings() == 1
    assert trainings(run_folds=[0, 1]) == 1  # the first fold's is there
    folds = json.loads((out / "splits_final.json").read_text())
    (data / "splits_final.json").write_text(json.dumps(folds[::-1]))
    assert trainings() == 1
    assert trainings() == 0
    first, *others = folds[1]["train"]
    names = sorted({name for fold in folds for name in fold["val"]})
    rows = [f"{name},{first if name in others else name}" for name in names]
    (data / "patients.csv").write_text("\n".join(["case,patient", *rows]) + "\n")
    assert trainings() == 1


def test_test_cases__are_read_once_and_only_after_all_training(make_dataset, tiny_config, tmp_path, monkeypatch):
    events = []
    read = LabelledDataset.read_images
    fit = FitLoop.fit
    monkeypatch.setattr(
        LabelledDataset, "read_images", lambda self, case, channels: (events.append(case.name), read(self, case, channels))[1]
    )
    label = LabelledDataset.read_label
    monkeypatch.setattr(
        LabelledDataset,
        "read_label",
        lambda self, case, grid: (events.append(f"label {case.name}"), label(self, case, grid))[1],
    )
    monkeypatch.setattr(FitLoop, "fit", lambda self, *arguments: (fit(self, *arguments), events.append("trained"))[0])
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
    network = experiment.network(experiment.source, 0)
    load_network(network, weights_path(tmp_path, 0, 0))
    assert state_hash(network.backbone) != before


def test_frozen_that_moved__is_a_fault(make_dataset, tiny_config, tmp_path, monkeypatch):
    def drifts(self, on_step, start):
        with torch.no_grad():
            self.module.backbone.network.norm.weight += 1

    monkeypatch.setattr(FitLoop, "fit", drifts)
    experiment = open_experiment(tiny_config(), MODEL, make_dataset())
    with pytest.raises(RuntimeError, match=r"network\.norm\.weight"):
        run_module.train_all(experiment, tmp_path)


def test_cached_tokens__give_the_same_weights_as_computing_them_each_step(make_dataset, tiny_config, tmp_path, monkeypatch):
    data, config = make_dataset(), tiny_config(seeds=[0], training={"batch_size": 1})
    segment(config, MODEL, data, tmp_path / "cached")
    monkeypatch.setattr(Fitting, "_maps_of", lambda self, network: None)
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
    from meddino_evaluation.segmentation.networks.encoders import load_encoder

    import meddino

    loaded = load_encoder("random:vitnano8", random_seed=1)
    again, other = load_encoder("random:vitnano8", random_seed=1), load_encoder("random:vitnano8", random_seed=2)
    assert loaded.model_hash == again.model_hash != other.model_hash
    assert loaded.contract.own == meddino.load("random:vitnano8").contract


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"crop_px": 36}}, "multiples of 8: use 32 or 40"),
        ({"encoder": {"taps": 9}}, "this model has 4 blocks"),
        ({"data": {"neighbour_slices": 2}}, "takes 1 .repeated. or 3"),
        ({"splits": {"run_folds": [3]}}, "fold 3 does not exist"),
        ({"labels": {"train_slices": 1000}}, r"labels\.train_slices is 1000"),
        ({"labels": {"train_cases": 7}}, r"labels\.train_cases is 7"),
    ],
)
def test_wrong_settings__one_clear_line(make_dataset, tiny_config, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        segment(tiny_config(**change), MODEL, make_dataset(), tmp_path / "out")


def test_folds__fit_the_number_of_patients(blobs, tiny_config, caplog):
    experiment = open_experiment(tiny_config(splits={"folds": 9, "run_folds": [0, 3]}), MODEL, blobs)
    assert [len(split.test) for split in experiment.splits] == [1, 1]
    assert "4 folds" in caplog.text


def test_labels_use__only_some_structures_are_learned(blobs, tiny_config, tmp_path):
    metrics = segment(tiny_config(labels={"use": ["dark"]}, seeds=[0]), MODEL, blobs, tmp_path / "out")
    assert list(metrics["test"]["by_label"]) == ["dark"]
    for path in (tmp_path / "out/predictions/fold-0_seed-0").iterdir():
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) <= {0, 2}


def test_recipes__by_budget_load_and_one_is_chosen_by_the_machine(caplog):
    caplog.set_level("INFO")
    for name in ("minutes", "evening", "paper"):
        load_config(SegmentConfig, [name], kind="evaluation")
    assert default_config() == ("evening" if torch.cuda.is_available() else "minutes")
    assert "chosen for this machine" in caplog.text


def test_plan__is_said_first_and_what_is_left_after_twenty_steps(blobs, tiny_config, tmp_path, caplog):
    caplog.set_level("INFO")
    segment(tiny_config(training={"steps": 22, "batch_size": 1}, seeds=[0]), MODEL, blobs, tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines.index("plan: fold 0 trains on 2 cases, selects on 0, tests on 2") == 0
    assert any("20 steps" in line and "left" in line and "GiB" in line for line in lines)


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
        (["--model", "nowhere/"], "no model 'nowhere/'"),
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


@pytest.mark.parametrize("name", ["paper", "demo", "demo_real", "few_patients", "sarcoma"])
def test_shipped_configs__are_valid(name):
    assert load_config(SegmentConfig, [name], kind="evaluation").head.name == ("primus" if name == "paper" else "linear")


def test_show__prints_every_setting_and_what_differs(capsys):
    assert main(["show", "segment", "--config", "sarcoma"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.strip().startswith("tolerance_mm: 1.0  # ") for line in shown)
    assert main(["show", "segment", "--config", "demo_real", "--against", "demo"]) == 0
    keys = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["splits.folds", "splits.run_folds", "training.crop_px"]


@pytest.mark.parametrize("mode", ["lora", "bitfit", "partial", "finetune"])
def test_modes__what_learns_moves_and_the_rest_is_held(make_dataset, tiny_config, tmp_path, mode):
    config = tiny_config(encoder={"mode": mode, "lora_rank": 2, "partial_blocks": 1}, seeds=[0], training={"steps": 2})
    metrics = segment(config, MODEL, make_dataset(), tmp_path / mode)  # FreezeCheck raises otherwise
    assert metrics["test"]["cases"] == 2
    from safetensors import safe_open

    with safe_open(tmp_path / mode / "weights/fold-0_seed-0.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118 (no mapping)
    parameters = [name for name in names if "periods" not in name and "bias_mask" not in name]
    assert parameters
    if mode == "lora":
        assert all("lora_" in name for name in parameters)
    if mode == "bitfit":
        assert all(name.endswith("bias") for name in parameters)
    if mode == "partial":
        assert not any(".blocks.0." in name for name in parameters)


@pytest.mark.parametrize("head", ["whole_unet", "whole_segformer"])
def test_model_none__networks_of_their_own(make_dataset, tiny_config, tmp_path, head):
    pytest.importorskip("transformers", reason="whole_segformer is transformers' own")
    config = tiny_config(head={"name": head}, training={"steps": 1}, seeds=[0])
    assert segment(config, "none", make_dataset(), tmp_path / head)["test"]["cases"] == 2


def test_killed_training__goes_on_and_ends_in_the_same_bytes(make_dataset, tiny_config, tmp_path, monkeypatch):
    data = make_dataset(cases=6)
    config = tiny_config(
        encoder={"mode": "finetune"},
        training={"steps": 8, "save_every_steps": 2, "selection": "best_val", "val_every_steps": 3},
        splits={"val_fraction": 0.3},
        seeds=[0],
    )
    segment(config, MODEL, data, tmp_path / "whole")
    batch = CropSampler.batch

    def dies(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(CropSampler, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        segment(config, MODEL, data, tmp_path / "killed")
    monkeypatch.setattr(CropSampler, "batch", batch)
    segment(config, MODEL, data, tmp_path / "killed")
    for name in ("weights/fold-0_seed-0.safetensors", "cases.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list((tmp_path / "killed/weights").glob("*.progress*"))


def test_lr_grid__the_best_on_validation_is_used(make_dataset, tiny_config, tmp_path):
    grid = {"selection": "best_val", "val_every_steps": 10, "steps": 20, "lr_head_grid": [1e-9, 0.05]}
    config = tiny_config(training=grid, splits={"val_fraction": 0.4}, seeds=[0])
    segment(config, MODEL, make_dataset(cases=6), tmp_path / "out")
    chosen = json.loads((tmp_path / "out/logs/fold-0_lr.json").read_text())
    assert chosen["chosen"] == 0.05
    assert chosen["val_dice"]["0.05"] > chosen["val_dice"]["1e-09"]


def test_patience__stops_early(make_dataset, tiny_config, tmp_path):
    stop = {"selection": "best_val", "val_every_steps": 1, "steps": 50, "patience": 2, "lr_head": 1e-12}
    segment(tiny_config(training=stop, splits={"val_fraction": 0.4}, seeds=[0]), MODEL, make_dataset(cases=6), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/logs/fold-0_seed-0.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2


@pytest.mark.parametrize("change", [{"lr_head_grid": [0.1]}, {"patience": 3}])
def test_selection_without_validation__is_refused(tiny_config, change):
    with pytest.raises(ConfigError, match=r"needs validation cases: set training\.selection=best_val"):
        tiny_config(training=change)


def test_augmentation__is_a_function_of_the_seed_and_keeps_labels_on_their_pixels(make_dataset, tiny_config, tmp_path):
    from meddino_evaluation.segmentation.training.augmentation import augment

    label = np.zeros((64, 64), dtype=np.int32)
    label[20:40, 24:44] = 2
    image = torch.from_numpy(np.where(label == 2, 400.0, -200.0)).float()[None]
    changed = 0
    for seed in range(30):
        found, moved = augment(image, label, (-1000.0, 1000.0), seed)
        again, moved_again = augment(image, label, (-1000.0, 1000.0), seed)
        assert torch.equal(found, again)
        assert np.array_equal(moved, moved_again)
        assert set(np.unique(moved)) <= {-1, 0, 2}
        bright = (found[0] > 100).numpy()
        inside = moved == 2
        if inside.any() and bright.any():
            assert 2 * (bright & inside).sum() / (bright.sum() + inside.sum()) > 0.8
        changed += not torch.equal(found, image)
    assert changed > 20


def test_leakage__test_volumes_of_the_corpus_are_named(make_dataset, tiny_config, tmp_path, monkeypatch):
    from meddino_data_curation import cli as curate

    data = make_dataset()
    options = [
        "slices.min_per_volume=1",
        "slices.min_size_px=8",
        "slices.min_body_fraction=0",
        "privacy.salt_file=" + str(tmp_path / "salt"),
    ]
    (tmp_path / "salt").write_text("tests only\n")
    assert curate.main(["build", str(data / "imagesTr"), "--out", str(tmp_path / "corpus"), *options]) == 0
    out = tmp_path / "out"
    metrics = segment(tiny_config(seeds=[0]), MODEL, data, out, corpus=tmp_path / "corpus")
    test = json.loads((out / "splits.json").read_text())[0]["test"]
    assert metrics["leakage"]["compared_with"] == "the corpus"
    assert metrics["leakage"]["test_cases_in_pretraining"] == test
    assert "has seen these test volumes in pretraining" in (out / "report.html").read_text()


def test_largest_component__only_of_labels_it_helps():
    from meddino_evaluation.data.labels import LabelScheme
    from meddino_evaluation.segmentation.inference.postprocess import keep_largest, labels_it_helps

    scheme = LabelScheme(("a", "b"), ((1,), (2,)))
    labels = np.zeros((3, 6, 6), dtype=np.int32)
    labels[:, :3, :3], labels[0, 5, 5], labels[2, 5, 0:2], labels[0, 5, 3] = 1, 1, 2, 2
    cleaned = keep_largest(labels, scheme, ["a"])
    assert cleaned[0, 5, 5] == 0
    assert (cleaned == 2).sum() == 3
    assert (keep_largest(labels, scheme, ["a", "b"]) == 2).sum() == 2
    nan = float("nan")
    assert labels_it_helps([{"a": 0.5, "b": 0.5}, {"a": nan, "b": 0.5}], [{"a": 0.6, "b": 0.6}, {"a": nan, "b": 0.3}]) == ("a",)
