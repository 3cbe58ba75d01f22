import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from meddino_evaluation.adaptation import features
from meddino_evaluation.adaptation.config import FewShotConfig
from meddino_evaluation.adaptation.few_shot import few_shot_draws
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.classification import evaluate as evaluate_module
from meddino_evaluation.classification import report as report_module
from meddino_evaluation.classification.config import SplitConfig
from meddino_evaluation.classification.datasets import LabelledSet
from meddino_evaluation.classification.evaluate import evaluate
from meddino_evaluation.classification.report import mistakes, write_report
from meddino_evaluation.classification.results import read_per_case
from meddino_evaluation.cli import main
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.splits import SealedTest
from meddino_evaluation.metrics.classification import METRICS, classification_metric
from meddino_evaluation.metrics.text_table import Table, metric_text

from meddino.core.errors import ConfigError
from tests.browser import check_page

FROZEN = ("knn", "logistic", "linear", "mlp", "attention")


@pytest.fixture
def spy(monkeypatch):
    """Records which image is read and when something has been learned."""
    log = []
    read = features.read_slices
    monkeypatch.setattr(features, "read_slices", lambda source, modality: log.append(source) or read(source, modality))
    learn = evaluate_module.learn

    def learned(protocol, task):
        result = learn(protocol, task)
        log.append(f"learned {protocol}")
        return result

    monkeypatch.setattr(evaluate_module, "learn", learned)
    return log


def testcontradictions__one_image_with_two_labels_is_told(fake_set):
    dataset = fake_set("ct_contrast")
    first, second = (next(case for case in dataset.cases if case.label == label) for label in (0, 1))
    digests = {case.name: case.name for case in dataset.cases}
    assert evaluate_module.contradictions(dataset, digests) == []
    (note,) = evaluate_module.contradictions(dataset, {**digests, second.name: first.name})
    assert "1 images are there more than once" in note and first.name in note and second.name in note


@pytest.mark.parametrize("few_shot", [False, True])
def test_evaluate__the_test_is_read_once_after_everything_is_learned(fake_set, backbone, quick, tmp_path, spy, few_shot):
    dataset = fake_set("ct_contrast")
    config = quick(protocols=(*FROZEN, "bitfit"), split=SplitConfig(repeats=1))
    evaluate(backbone, dataset, config, tmp_path, few_shot=few_shot)
    split = json.loads((tmp_path / "splits" / "split-0.json").read_text())
    sources = {case.name: case.source for case in dataset.cases}
    last_fit = max(place for place, entry in enumerate(spy) if entry.startswith("learned"))
    for name in split["test"]:
        places = [place for place, entry in enumerate(spy) if entry == sources[name]]
        assert min(places) > last_fit
    # Protocols on frozen features read it for its features; those that train the backbone read it once more for theirs.
    assert sum(entry == sources[split["test"][0]] for entry in spy) == (1 if few_shot else 2)


@pytest.mark.parametrize("protocol", FROZEN)
def test_frozen_protocols__leave_every_parameter_and_buffer(fake_set, backbone, quick, tmp_path, protocol):
    before = state_hash(backbone)
    evaluate(backbone, fake_set("ct_contrast"), quick(protocols=(protocol,), split=SplitConfig(repeats=1)), tmp_path)
    assert state_hash(backbone) == before


def test_frozen_that_moved__is_a_fault(fake_set, backbone, quick, tmp_path, monkeypatch):
    learn = evaluate_module.learn

    def drifts(protocol, task):
        with torch.no_grad():
            next(task.backbone.parameters()).add_(1)
        return learn(protocol, task)

    monkeypatch.setattr(evaluate_module, "learn", drifts)
    with pytest.raises(RuntimeError, match="changed while features were computed"):
        evaluate(backbone, fake_set("ct_contrast"), quick(protocols=("knn",), split=SplitConfig(repeats=1)), tmp_path)


def test_sealed_test__a_second_look_is_a_fault():
    sealed = SealedTest([], lambda cases: "part")
    assert sealed.open() == "part"
    with pytest.raises(RuntimeError, match="second time"):
        sealed.open()


def test_evaluate__choices_do_not_depend_on_the_test(fake_set, backbone, quick, tmp_path):
    dataset = fake_set("ct_contrast")
    config = quick(protocols=FROZEN, split=SplitConfig(repeats=1))
    first = evaluate(backbone, dataset, config, tmp_path / "a")
    split = json.loads((tmp_path / "a" / "splits" / "split-0.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(split))
    turned = tuple(replace(case, label=1 - case.label) if case.name in split["test"] else case for case in dataset.cases)
    other = LabelledSet(dataset.config, dataset.root, turned, True)
    second = evaluate(
        backbone, other, quick(protocols=FROZEN, split=SplitConfig(repeats=1, file=tmp_path / "s.json")), tmp_path / "b"
    )
    for a, b in zip(first["results"], second["results"], strict=True):
        assert a["chosen"] == b["chosen"]
    assert first["data"]["hash"] != second["data"]["hash"]


@pytest.mark.parametrize("name", ["ct_contrast", "ct_plane", "nih_chestxray14", "aptos2019", "glioma_grading"])
def test_evaluate__every_kind_of_task_and_every_number_from_the_csv(fake_set, backbone, quick, tmp_path, name):
    dataset = fake_set(name)
    content = evaluate(backbone, dataset, quick(), tmp_path)
    runs = read_per_case(tmp_path / "per_case.csv", dataset.config.classes, dataset.kind)
    assert json.loads((tmp_path / "metrics.json").read_text()) == content
    for entry in content["results"]:
        own = [run for run in runs if run.protocol == entry["protocol"]]
        assert len(own) == entry["runs"] == 2
        for metric in METRICS[dataset.kind]:
            values = [classification_metric(metric, dataset.kind, run.truth, run.probabilities) for run in own]
            recorded = [math.nan if value is None else value for value in entry["metrics"][metric]["runs"]]
            np.testing.assert_allclose(values, recorded, atol=1e-12)
    assert content["model"]["hash"] == backbone.hash()
    assert {"hash", "patients", "licence"} <= set(content["data"])
    table = write_report(content, tmp_path, dataset, "svg", ("accuracy",))
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert len(table.rows) == 2
    assert (tmp_path / "results_compact.csv").read_text().startswith("protocol,training,accuracy\n")
    wrong = mistakes(runs, 12)
    drawn = {"roc.svg", "calibration.svg"} | ({"misclassified.svg"} if wrong else set())
    several = dataset.kind == "multilabel"
    drawn |= set() if several else {"confusion-knn.svg", "confusion-linear.svg"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == drawn
    assert not wrong or "black to white: " in (tmp_path / "figures/misclassified.svg").read_text()  # which values are shown
    slow = [
        (-run.probabilities[n].max(), case)
        for run in runs
        for n, case in enumerate(run.ids)
        if not several and run.probabilities[n].argmax() != run.truth[n]
    ]
    assert {one.case for one in wrong} == {case for _, case in slow} or len(wrong) == 12
    assert not wrong or (-wrong[0].probability, wrong[0].case) == min(slow)
    assert [origin[:9] for origin in content["splits"]] == ["repeat 0:", "repeat 1:"]
    if name in ("ct_plane", "nih_chestxray14"):
        check_page(tmp_path / "report.html")


def test_evaluate__equal_seeds_give_equal_files(fake_set, backbone, quick, tmp_path):
    dataset = fake_set("ct_contrast")
    for out in ("a", "b"):
        evaluate(backbone, dataset, quick(protocols=("knn", "linear", "bitfit")), tmp_path / out)
    assert (tmp_path / "a" / "per_case.csv").read_bytes() == (tmp_path / "b" / "per_case.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["linear"], ("logistic", "linear", "mlp")),
        (["finetune", "split.repeats=2"], ("finetune",)),
        (["linear", "protocols=[knn]"], ("knn",)),
        (["linear", "--config", "lvm_med_classification"], ("linear", "mlp", "finetune", "finetune_mlp")),
    ],
)
def test_run__protocols_are_the_commands_unless_a_config_or_the_user_names_some(words, wanted, fake_set, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate_module, "evaluate", lambda backbone, dataset, config, out, few_shot: given.append(config))
    monkeypatch.setattr(report_module, "write_report", lambda *_: Table(("a",), ()))
    root = fake_set("pneumoniamnist").root
    command, *more = words
    assert (
        main(
            [
                command,
                "--model",
                "random:vitnano8",
                "--data",
                "pneumoniamnist",
                "--root",
                str(root),
                "--out",
                str(tmp_path),
                *more,
            ]
        )
        == 0
    )
    assert given[0].protocols == wanted
    if "--config" in more:
        assert (given[0].linear.optimizer, given[0].linear.learning_rates) == ("adamw", (5e-4, 1e-3))
        assert (given[0].finetune.backbone_lr, given[0].statistics.selection) == (5e-4, "accuracy")


def test_evaluate__pretraining_overlap_is_refused_or_said(fake_set, backbone, quick, tmp_path, monkeypatch):
    dataset = fake_set("ct_contrast")
    monkeypatch.setattr(LeakageCheck, "look", lambda self, name, *hashes: name == dataset.cases[0].name)
    with pytest.raises(ConfigError, match=r"were seen \(without labels\) in pretraining"):
        evaluate(backbone, dataset, quick(protocols=("knn",)), tmp_path / "a")
    allowed = quick(protocols=("knn",), split=SplitConfig(repeats=1, allow_pretraining_overlap=True))
    content = evaluate(backbone, dataset, allowed, tmp_path / "b")
    assert any("seen (without labels) in pretraining" in note for note in content["notes"])


def test_few_shot__draws_are_by_patient_nested_and_seeded(fake_set):
    cases = fake_set("ct_contrast", 20).cases
    config = FewShotConfig(patients_per_class=(1, 2, 4, 8, 16, 64), draws=3, fractions=(0.25, 1.0))
    draws = few_shot_draws(cases, "binary", 2, config, 5)
    by_setting = {}
    for draw in draws:
        by_setting.setdefault(draw.setting, []).append(draw)
        patients = {cases[place].patient for place in draw.places}
        everything = {place for place, case in enumerate(cases) if case.patient in patients}
        assert set(draw.places) == everything  # all cases of a chosen patient
        if draw.setting.startswith("shots"):
            wanted = min(int(draw.setting.split("=")[1]), 20)
            labels = {patient: case.label for case in cases for patient in [case.patient] if patient in patients}
            assert [list(labels.values()).count(label) for label in (0, 1)] == [wanted, wanted]
    assert set(by_setting) == {
        "shots=1",
        "shots=2",
        "shots=4",
        "shots=8",
        "shots=16",
        "shots=64",
        "fraction=0.25",
        "fraction=1",
    }
    assert set(by_setting["shots=2"][0].places) < set(by_setting["shots=4"][0].places)
    assert (
        by_setting["shots=1"][0].places != by_setting["shots=1"][1].places
        or by_setting["shots=1"][1] != by_setting["shots=1"][2]
    )
    assert few_shot_draws(cases, "binary", 2, config, 5) == draws


@pytest.mark.parametrize("protocol", ["linear", "bitfit"])
def test_few_shot__no_weights_leak_between_draws(fake_set, backbone, quick, tmp_path, protocol):
    dataset = fake_set("ct_contrast")
    many = quick(
        few_shot=FewShotConfig(patients_per_class=(1, 2), draws=2, protocols=(protocol,)), split=SplitConfig(repeats=1)
    )
    only = quick(few_shot=FewShotConfig(patients_per_class=(2,), draws=1, protocols=(protocol,)), split=SplitConfig(repeats=1))
    for out, config in (("many", many), ("only", only)):
        evaluate(backbone, dataset, config, tmp_path / out, few_shot=True)
    runs = {out: read_per_case(tmp_path / out / "per_case.csv", dataset.config.classes, "binary") for out in ("many", "only")}
    alone = runs["only"][0]
    after_others = next(run for run in runs["many"] if run.setting == "shots=2" and run.draw == 0)
    np.testing.assert_array_equal(alone.probabilities, after_others.probabilities)
    assert len(runs["many"]) == 4


def test_evaluate__selection_metric_must_exist(fake_set, backbone, quick, tmp_path):
    from meddino_evaluation.classification.config import StatisticsConfig

    config = quick(statistics=StatisticsConfig(selection="dice", resamples=20))
    with pytest.raises(ConfigError, match="'dice' is no metric of a binary task"):
        evaluate(backbone, fake_set("ct_contrast"), config, tmp_path)


def test_table__columns_are_chosen_and_the_best_is_bold():
    rows = (("a", "m1", "0.9 ± 0.1", "0.2"), ("a", "m2", "0.8", "0.1"), ("b", "m1", "0.5", "–"), ("b", "m2", "–", "0.3"))
    table = Table(("data", "model", "auroc", "ece"), rows).best_in_bold(("data",), ("auroc",), ("ece",))
    assert [row[2:] for row in table.rows] == [("**0.9 ± 0.1**", "0.2"), ("0.8", "**0.1**"), ("0.5", "–"), ("–", "0.3")]
    assert table.only(("model", "ece")).header == ("model", "ece")
    assert r"\textbf{0.9 $\pm$ 0.1}" in table.latex()


def test_table__formats():
    table = Table(("a_b", "c"), (("1 & 2", "0.5 ± 0.1"), ("x|y", "–")))
    assert table.csv().splitlines()[1] == "1 & 2,0.5 ± 0.1"
    assert table.markdown().splitlines()[3] == "| x\\|y | – |"
    assert r"1 \& 2 & 0.5 $\pm$ 0.1 \\" in table.latex()
    assert r"a\_b & c \\" in table.latex()
    assert metric_text({"mean": 0.5, "std": None, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]"
    assert metric_text({"mean": None, "std": None, "low": None, "high": None}) == "–"
