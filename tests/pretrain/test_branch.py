"""A new run from a checkpoint of another: what a run left alone would have done, and what may be changed on purpose."""

import json
from pathlib import Path

import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.core.config import load_config

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"


def trace(run: Path) -> list[dict]:
    records = read_metrics(run / STAGE / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != TIMING} for record in records]


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_corpus_once):
    run = tmp_path_factory.mktemp("original") / "run"
    run_pretraining(load_config(PretrainConfig, [TINY]), make_corpus_once, run, [STAGE])
    return run


@pytest.fixture
def branch(original, make_corpus_once, tmp_path):
    """Branch from a checkpoint of the original, or from its newest, and train on; returns the exit code."""

    def run(*words: str, step: int | None = None, start: Path | None = None) -> int:
        source = start or (original if step is None else original / STAGE / "checkpoints" / f"step-{step:09d}")
        given = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "new"), "--stage", STAGE]
        return main([*given, "--branch-from", str(source), *words])

    return run


def test_branch__the_same_recipe_from_a_checkpoint_is_the_same_run(branch, original, tmp_path):
    assert branch(step=4) == 0
    assert trace(tmp_path / "new") == trace(original)
    last = f"{STAGE}/checkpoints/step-000000006/rank-00000.safetensors"
    assert (tmp_path / "new" / last).read_bytes() == (original / last).read_bytes()
    info, before = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "new", original))
    assert info["branched_from"] == {"run": "run", "stage": STAGE, "step": 4}
    assert info["id"] != before["id"]


def test_branch__a_finished_stage_is_extended_at_a_lower_rate(branch, original, tmp_path):
    change = (f"stages.{STAGE}.steps=8", f"stages.{STAGE}.schedule.lr=0.0001")
    before = (original / "run.json").read_bytes()
    assert branch(*change) == 0
    records = trace(tmp_path / "new")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert records[:6] == trace(original)
    assert records[7]["lr"] == pytest.approx(0.0001)
    assert (original / "run.json").read_bytes() == before
    assert json.loads((tmp_path / "new" / "run.json").read_text())["stages"][STAGE]["steps"] == 8  # the report's "of"
    assert branch(*change) == 0  # the same command again finds it done


@pytest.mark.parametrize(
    ("words", "start", "said"),
    [
        (["stages.stage1_pretrain.steps=6"], None, "the checkpoint stands after step 6: give more"),
        ([], Path("nowhere"), "neither a run's folder nor a checkpoint's"),
    ],
)
def test_branch__wrong_input_is_one_line_and_leaves_nothing(branch, tmp_path, capsys, words, start, said):
    assert branch(*words, start=start) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_branch__the_folder_of_something_else_is_left_alone(branch, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    assert branch(f"stages.{STAGE}.steps=8") == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "new" / "mine.txt").read_text() == "mine"
