"""The probe of patch tokens: labels of patches, counts, choice on validation, and the command as a user calls it."""

import csv
import json

import numpy as np
import pytest
import torch
from meddino_evaluation.cli import main
from meddino_evaluation.data.labels import IGNORED
from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig
from meddino_evaluation.segmentation.dense_probe.patches import PIXELS, PatchSet, patch_labels, thinned
from meddino_evaluation.segmentation.dense_probe.readout import best_on_validation, count_patches, fit_all, macro_f1
from sklearn.metrics import f1_score


def test_patch_labels__the_most_frequent_class_the_higher_one_of_equals():
    labels = np.array([[[0, 0, 2, 2], [0, 1, 0, 0], [IGNORED] * 2 + [3, 3], [IGNORED] * 2 + [IGNORED, 0]]], dtype=np.int32)
    assert patch_labels(labels, 2, 4).tolist() == [[[0, 2], [IGNORED, 3]]]


def patches(seed: int, patients: int, noise: float) -> PatchSet:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 400)
    good = np.eye(4)[labels] + noise * rng.normal(size=(400, 4))
    features = {"blocks1": torch.from_numpy(good).float(), PIXELS: torch.from_numpy(rng.normal(size=(400, 4))).float()}
    return PatchSet(features, labels, rng.integers(0, patients, 400))


def test_macro_f1__is_scikit_learns_over_the_classes_without_background():
    truth, rng = patches(0, 3, 1.0), np.random.default_rng(1)
    predicted = np.where(rng.random(400) < 0.6, truth.labels, rng.integers(0, 4, 400))
    counts = count_patches(predicted, truth, 3, 4)
    assert macro_f1(counts) == pytest.approx(f1_score(truth.labels, predicted, labels=[1, 2, 3], average="macro"), abs=1e-12)
    assert counts.sum(0)[:, 0].sum() + counts.sum(0)[:, 2].sum() == 400


def test_fit_all__validation_prefers_the_features_that_tell_the_classes():
    config = ProbeConfig(strengths=(0.1, 1.0), neighbours=(5,))
    fitted = fit_all(patches(0, 2, 0.2), patches(1, 2, 0.2), patches(2, 2, 0.2), ["blocks1", PIXELS], config, 4)
    assert {(one.features, one.readout) for one in fitted} == {(f, r) for f in ("blocks1", PIXELS) for r in ("knn", "logistic")}
    best = best_on_validation(fitted, ["blocks1", PIXELS])
    assert best.features == "blocks1" and (best.predicted == patches(2, 2, 0.2).labels).mean() > 0.95


def test_thinned__keeps_so_many_of_each_label():
    kept = thinned(patches(0, 2, 1.0), 20, np.random.default_rng(0))
    assert np.bincount(kept.labels).tolist() == [20, 20, 20, 20]


def test_probe__as_a_command_every_number_comes_from_cases_csv(make_dataset, tmp_path, capsys):
    tiny_dataset = make_dataset()
    out = tmp_path / "probe"
    words = ["data.size_px=32", "train_slices=4", "case_slices=3", "strengths=[0.1]", "neighbours=[3]", "seeds=[0,1]"]
    models = ["--model", "random:vitnano8", "--model", "again=random:vitnano8"]
    assert main(["probe", *models, "--data", str(tiny_dataset), "--out", str(out), *words]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["models"]) == {"random:vitnano8", "again", "pixels"}
    assert metrics["models"]["again"] == metrics["models"]["random:vitnano8"]
    with (out / "cases.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["model"] == "pixels" and row["readout"] == "chosen"]
    labels = sorted({row["label"] for row in rows})
    # Pixels are the same for both models: each patient counts once.
    assert len({(row["seed"], row["patient"], row["label"]) for row in rows}) == len(rows)
    for place, seed in enumerate(("0", "1")):
        scores = []
        for label in labels:
            tp, fp, fn = (sum(int(r[k]) for r in rows if r["seed"] == seed and r["label"] == label) for k in ("tp", "fp", "fn"))
            scores += [2 * tp / (2 * tp + fp + fn)] if tp + fp + fn else []
        assert metrics["models"]["pixels"]["chosen"]["macro_f1"]["by_seed"][place] == pytest.approx(np.mean(scores))
    tested = [name for split in metrics["splits"] for name in split["test"]]
    assert len(tested) == len(set(tested))
    for split in metrics["splits"]:
        assert not set(split["train"]) & set(split["test"]) and not set(split["val"]) & set(split["test"])


def test_probe__a_wrong_data_set_is_one_line(tmp_path, capsys):
    assert main(["probe", "--model", "random:vitnano8", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    assert "none" in capsys.readouterr().err
