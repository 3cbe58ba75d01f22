"""run/report.html and what it is made from: whatever the run's length, in little time and memory."""

import json
import math
import time
from unittest.mock import Mock

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.base import Method
from meddino_pretrain.monitoring import history as history_module
from meddino_pretrain.monitoring.feature_metrics import FeatureProbe
from meddino_pretrain.monitoring.history import POINTS, History
from meddino_pretrain.monitoring.labelled_probe import LabelledProbe
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.monitoring.monitor import Monitor
from meddino_pretrain.monitoring.report import RunReport, stage_charts
from meddino_pretrain.stages import run_pretraining

from meddino.core.config import load_config
from meddino.core.errors import CheckpointError
from tests.browser import check_page

STAGE = "stage1_pretrain"


def record(step: int, wait_s: float = 0.02) -> dict:
    """A step's record as the trainer writes it; a probe at every 50th."""
    numbers = {"loss": 12 - 4 * step / 1e5, "dino_global": 6.0, "dino_local": 6.0, "ibot": 5.0, "koleo": -1.0}
    numbers |= {"grad_norm/backbone": 1 + math.sin(step) / 4, "grad_norm/dino_head": 0.5, "teacher_entropy": 3.87120101}
    numbers |= {"prototypes_used": 0.4, "lr": 1e-3, "weight_decay": 0.04, "ema_momentum": 0.994, "teacher_temperature": 0.07}
    if step % 50 == 0:
        looks = ("cls_rankme", "patch_rankme", "nearest_distance", "cls_drift", "patch_drift", "neighbours_kept")
        looks += ("patch_consistency", "cls_assignments_used", "patch_assignments_used")
        numbers |= {f"features/{name}": 5 + step / 1e5 for name in looks}
    timing = {"step_s": 0.5, "data_wait_s": wait_s, "eval_time_s": 0.1, "eta_s": 3725.0, "images_per_s": 8.0 + step % 3}
    timing |= {"tflops": 0.1, "share_of_peak": 0.6 + 0.3 * (step % 3 == 0), "peak_memory_mib": 900.0}
    return {"step": step, **numbers, "corrupt_samples": 0, "skipped": False, "timing": timing}


def lines(steps: range, **options) -> str:
    return "".join(json.dumps(record(step, **options)) + "\n" for step in steps)


@pytest.fixture
def begun(request, tmp_path):
    """Return a function that makes a run's folder with so many steps of stage 1, and its report."""

    def make(steps: int, *overrides: str, **options) -> RunReport:
        config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], ["saving.report=true", *overrides])
        (tmp_path / STAGE).mkdir()
        (tmp_path / STAGE / "metrics.jsonl").write_text(lines(range(1, steps + 1), **options))
        origin = {"message": "fresh weights", "weights": None, "kept_backbone": None, "choice": None, "steps": 120_000}
        (tmp_path / "run.json").write_text(json.dumps({"stages": {STAGE: origin}, "corpus_hash": "f" * 64}))
        return RunReport(tmp_path, config)

    return make


def test_history__updates_and_starts_anew_where_it_was_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    found = History(path, newest=10)
    found.update()
    assert found.count == 0 and found.records == []
    path.write_text(lines(range(1, 31)) + '{"step": 31, "lo')
    found.update()
    assert found.count == 30 and [each["step"] for each in found.records] == list(range(1, 31))
    path.write_text(lines(range(1, 41)))
    found.update()
    assert found.count == 40 and found.totals["step_s"] == pytest.approx(20.0) and found.peak_memory_mib == 900
    path.write_text(lines(range(1, 6)))
    found.update()
    assert found.count == 5 and found.totals["eval_time_s"] == pytest.approx(0.5)
    path.write_text(lines(range(1, 6)) + "nonsense\n")
    with pytest.raises(CheckpointError, match="line 6: no JSON object"):
        found.update()


def test_history__keeps_the_first_the_newest_and_every_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "POINTS", 50)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(1, 1001)))
    found = History(path, newest=20)
    found.update()
    steps = [each["step"] for each in found.records]
    assert len(steps) <= 2 * 50 + 2 * 50 + 20 and steps == sorted(set(steps)) and steps[0] == 1
    assert steps[-20:] == list(range(981, 1001)) and set(range(50, 1001, 50)) <= set(steps)
    assert found.every == 16 and set(range(1, 1001, 16)) <= set(steps)
    assert found.count == 1000 and found.totals["step_s"] == pytest.approx(500)


def test_report__of_a_long_run_is_quick_and_shows_every_quantity(begun, tmp_path):
    report = begun(3000)
    report.findings(STAGE)
    (tmp_path / STAGE / "metrics.jsonl").open("a").write(lines(range(3001, 3051)))
    start = time.process_time()
    report.findings(STAGE)
    assert time.process_time() - start < 0.5
    html = report.write(finished=False).read_text()
    assert 'http-equiv="refresh"' in html and html.count("<img") == 8
    assert "1:02:05" in html and "3,050" in html and "120,000" in html
    assert '<td class="number">0.6</td>' in html  # the median share of peak, not the best
    assert f"every {2 ** math.ceil(math.log2(3050 / (2 * POINTS)))}th step" in html


def test_report__tells_corrupt_samples(begun, tmp_path):
    report = begun(3)
    records = [{**record(step), "corrupt_samples": step} for step in range(1, 4)]
    (tmp_path / STAGE / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert "met 6 times" in report.write(finished=True).read_text()


def test_report__a_stage_that_is_over_is_drawn_once(begun, monkeypatch):
    report = begun(20)
    first = report.write(finished=True).read_text()
    monkeypatch.setattr("meddino_pretrain.monitoring.report.stage_charts", None)
    assert report.write(finished=True).read_text() == first


def test_charts__entropy_has_ln_k_and_what_never_changes_is_a_line(request):
    terms = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")]).stages[STAGE].method.terms
    charts = stage_charts([record(step) for step in range(1, 101)], terms)
    drawn = [str(one) for one in charts if "<img" in one]
    said = [str(one) for one in charts if "<img" not in one]
    assert any("effective rank on fixed slices (RankMe)" in one for one in drawn)
    (entropy,) = [one for one in said if "entropy of the targets; at ln K they say nothing" in one]
    assert "3.871" in entropy and f"ln K is {math.log(48):.4g}" in entropy
    for name in (
        "learning rate: 0.001",
        "weight decay: 0.04",
        "EMA momentum of the teacher: 0.994",
        "temperature of the targets",
    ):
        assert any(name in one and "all 100 times" in one for one in said), name
    assert len(charts) == 17


def test_monitor__without_probes_there_is_a_report_and_the_loaders_verdict(begun, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("meddino_pretrain.monitoring.monitor.FIRST_REPORT_S", 0.0)
    report = begun(20, "probe.every_steps=0", wait_s=0.3)
    monitor = Monitor(
        tmp_path, STAGE, report.config, Mock(spec=FeatureProbe), Mock(spec=LabelledProbe), Mock(spec=Method), report, None
    )
    assert monitor.measure(20) == {}
    with caplog.at_level("INFO"):
        monitor.after_record(20, probed=False)
    assert "loader bound: The loader is the limit: 60% of the last 20 steps" in (tmp_path / "report.html").read_text()
    assert "The loader is the limit" in caplog.text and monitor.take_seconds() > 0 == monitor.take_seconds()
    (tmp_path / "report.html").unlink()
    monitor.after_record(21, probed=False)
    assert not (tmp_path / "report.html").exists()  # not again so soon


def test_run__probes_are_timed_and_reach_tensorboard(request, make_corpus_once, tmp_path):
    look = [f"stages.{STAGE}.steps=3", "probe.every_steps=1", "probe.slices=4", "saving.tensorboard=true", "saving.report=true"]
    config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], look)
    run_pretraining(config, make_corpus_once, tmp_path / "run", [STAGE])
    first, _, last = (each["timing"] for each in read_metrics(tmp_path / "run" / STAGE / "metrics.jsonl"))
    assert first["eval_time_s"] > 0 and last["eval_time_s"] > 0 and first["eta_s"] > last["eta_s"] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / STAGE / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"pictures/pca", "pictures/similarity"}
    assert [image.step for image in events.Images("pictures/pca")] == [0, 1, 2, 3]
    report = (tmp_path / "run/report.html").read_text()
    assert "slices (CT in the soft-tissue window (level 40, width 400 HU))" in report
    assert len(check_page(report)["pictures"]) >= 4  # principal components and similarities, of the first and the last probe


def test_report__pictures_say_how_each_modality_is_shown(begun, tmp_path):
    report = begun(3, "input_contract={modality: mr}", "other_contracts=[{modality: ct}]")
    (tmp_path / STAGE / "pictures").mkdir()
    (tmp_path / STAGE / "pictures/pca-000000003.png").write_bytes(b"")
    assert "MR in its volume&#39;s range, CT in the soft-tissue window" in report.write(finished=True).read_text()


def test_report__says_where_the_labelled_curve_is_of_other_data(begun, tmp_path):
    report = begun(400)
    records = [record(step) for step in range(1, 401)]
    for each in records[49::50]:
        each |= {"labelled/macro_f1": 0.5, "labelled/macro_f1_pixels": 0.25}
        if each["step"] > 100:  # an earlier version recorded no data
            each["labelled/data"] = ("a" if each["step"] < 250 else "b") * 64
    (tmp_path / STAGE / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    page = report.write(finished=True).read_text()
    assert page.count("The labelled data is another") == 1
    assert "The labelled data is another from step 250 on (bbbbbbbbbbbb)" in page
