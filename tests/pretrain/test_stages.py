"""The stage graph: what starts from what, one stage at a time, and the choice of the Gram teacher."""

import json
import logging

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.checkpoints import snapshot_folder
from meddino_pretrain.run.folder import RunFolder
from meddino_pretrain.run.initialization import resolve_start
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.config import load_config
from meddino.core.device import find_machine
from meddino.core.errors import CheckpointError, ConfigError

QUICK = ["stages.stage1_pretrain.steps=3", "stages.stage2_gram.steps=1", "stages.stage3_highres.steps=1"]


@pytest.fixture
def tiny(request):
    def load(*overrides: str) -> PretrainConfig:
        return load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], [*QUICK, *overrides])

    return load


def weights(run, stage, prefix="teacher."):
    return read_tensors(latest_checkpoint(run / stage / "checkpoints").folder, prefix)


def test_stages__hand_over_student_teacher_heads_and_gram_teacher(tiny, make_corpus_once, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    momentum = "stages.stage2_gram.method.teacher.ema_momentum"
    # A stage that cannot move what it was given.
    still = tiny("stages.stage2_gram.schedule.lr=1e-12", f"{momentum}=1.0", f"{momentum}_end=1.0")
    run_pretraining(still, make_corpus_once, run, ["stage1_pretrain", "stage2_gram"])
    for prefix in ("teacher.", "student."):
        before, after = weights(run, "stage1_pretrain", prefix), weights(run, "stage2_gram", prefix)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, atol=1e-9, rtol=0, msg=name)
    snapshot = read_tensors(snapshot_folder(run / "stage1_pretrain", 3), "backbone.")
    gram = weights(run, "stage2_gram", "gram_teacher.")
    assert snapshot.keys() == gram.keys()
    assert all(torch.equal(snapshot[name], gram[name]) for name in gram)
    info = json.loads((run / "run.json").read_text())["stages"]["stage2_gram"]
    assert info["weights"] == "stage1_pretrain/checkpoints/step-000000003"
    assert info["kept_backbone"] == "stage1_pretrain/snapshots/step-000000003"
    assert "stage2_gram starts from networks of stage1_pretrain after step 3" in caplog.text


def test_stages__a_stage_before_its_predecessor_is_refused(tiny, make_corpus_once, tmp_path):
    with pytest.raises(
        CheckpointError, match="stage2_gram starts from the end of stage1_pretrain, which stands at step 0 of 3"
    ):
        run_pretraining(tiny(), make_corpus_once, tmp_path / "run", ["stage2_gram"])


def test_stages__unknown_stage_is_refused(tiny, make_corpus_once, tmp_path):
    with pytest.raises(ConfigError, match=r"no stage 'stage4'.*stage3_highres"):
        run_pretraining(tiny(), make_corpus_once, tmp_path / "run", ["stage4"])


def test_stages__gram_teacher_by_measurement_may_leave_the_stage_out(tiny, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    auto = [
        "stages.stage1_pretrain.snapshot_steps=[1,2]",
        "stages.stage2_gram.method.gram_teacher.step=auto",
        "stages.stage2_gram.method.gram_teacher.choice.if_not_degraded=skip",
        "stages.stage2_gram.method.gram_teacher.choice.min_loss=0.9",  # no fall is that deep
        "stages.stage2_gram.method.gram_teacher.choice.slices=4",
        "saving.report=true",
    ]
    run_pretraining(tiny(*auto), make_corpus_once, run)
    info = json.loads((run / "run.json").read_text())["stages"]
    choice = info["stage2_gram"]["choice"]
    assert choice["action"] == "skip" and sorted(choice["curve"]) == ["1", "2", "3"]
    assert latest_checkpoint(run / "stage2_gram" / "checkpoints") is None
    assert info["stage3_highres"]["weights"] == "stage1_pretrain/checkpoints/step-000000003"
    lineage = latest_checkpoint(run / "stage3_highres" / "checkpoints").meta["lineage"]
    assert [stage["stage"] for stage in lineage["stages"]] == ["stage1_pretrain", "stage3_highres"]
    assert "patch consistency did not fall" in (run / "report.html").read_text()


def test_stages__findings_and_pictures_reach_the_report(tiny, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    look = [
        "saving.report=true",
        "probe.every_steps=2",
        "probe.slices=4",
        "diagnosis.patience_steps=1",
        "diagnosis.chance_share=0.01",
    ]
    run_pretraining(tiny(*look), make_corpus_once, run, ["stage1_pretrain"])
    records = [json.loads(line) for line in (run / "stage1_pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert ["features/patch_drift" in record for record in records] == [False, True, True]
    html = (run / "report.html").read_text()
    assert "heads not learning" in html and "After step 0, exported backbone" in html and "After step 3, exported" in html


@pytest.mark.parametrize("step", ["3", "auto"])
def test_stages__a_gram_teacher_that_somebody_deleted_is_named(tiny, make_corpus, tmp_path, step):
    config = tiny("stages.stage2_gram.starts_from=null", f"stages.stage2_gram.method.gram_teacher.step={step}")
    run = RunFolder(tmp_path / "run", config, "", {}, "")
    there = snapshot_folder(run.stage_folder("stage1_pretrain"), 1)
    there.mkdir(parents=True)
    (there / "meta.json").write_text("{}")
    said = r"stage1_pretrain kept after step 3; .*step-000000003 is missing \(steps that are there: 1\): put it back, or"
    with pytest.raises(CheckpointError, match=said):
        resolve_start(run, "stage2_gram", make_corpus(count=4), find_machine("cpu"))
