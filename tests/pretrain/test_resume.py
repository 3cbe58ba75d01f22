"""A run killed anywhere and started again equals the one that was left alone, bit for bit."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.core.config import load_config
from tests.processes import Started

TINY = Path(__file__).with_name("tiny.yaml")
STAGES = ("stage1_pretrain", "stage2_gram", "stage3_highres")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(corpus: Path, run: Path, *overrides: str) -> Started:
    command = [sys.executable, "-m", "meddino_pretrain.cli", str(TINY), "--corpus", str(corpus), "--out", str(run), *overrides]
    return Started(command, env=ENVIRONMENT)


def wait_for_step(process: Started, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    raise AssertionError(f"step {step} never came")


def trace(run: Path, stage: str) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key != TIMING} for record in read_metrics(run / stage / "metrics.jsonl")
    ]


def last_state(run: Path, stage: str) -> bytes:
    folders = sorted((run / stage / "checkpoints").iterdir())
    return (folders[-1] / "rank-00000.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_corpus_once):
    run = tmp_path_factory.mktemp("alone") / "run"
    run_pretraining(load_config(PretrainConfig, [TINY]), make_corpus_once, run)
    return run


def test_resume__sigkill_in_each_stage(alone, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    # After the first step that has no checkpoint of its own, and right in the middle of one being written.
    for stage, step in zip(STAGES, (3, 2, 3), strict=True):
        process = start(make_corpus_once, run)
        wait_for_step(process, run / stage / "metrics.jsonl", step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / STAGES[-1] / "checkpoints" / "step-000000004").is_dir()
    process = start(make_corpus_once, run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for stage in STAGES:
        assert trace(run, stage) == trace(alone, stage)
        assert last_state(run, stage) == last_state(alone, stage)
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (run, alone))
    assert ours.pop("id") != theirs.pop("id")
    assert ours == theirs


def test_resume__sigterm_saves_and_asks_to_be_run_again(alone, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    process = start(make_corpus_once, run, "saving.every_steps=1000")
    wait_for_step(process, run / STAGES[0] / "metrics.jsonl", 1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    saved = sorted(folder.name for folder in (run / STAGES[0] / "checkpoints").iterdir())
    assert len(trace(run, STAGES[0])) == int(saved[-1].removeprefix("step-"))
    run_pretraining(load_config(PretrainConfig, [TINY]), make_corpus_once, run)
    assert last_state(run, STAGES[-1]) == last_state(alone, STAGES[-1])


def test_resume__damaged_latest_falls_back(alone, make_corpus_once, tmp_path, caplog):
    run = tmp_path / "run"
    config = load_config(PretrainConfig, [TINY])
    run_pretraining(config, make_corpus_once, run, ["stage1_pretrain"])
    newest = sorted((run / STAGES[0] / "checkpoints").iterdir())[-1] / "rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    run_pretraining(config, make_corpus_once, run)
    assert "not usable" in caplog.text
    assert last_state(run, STAGES[-1]) == last_state(alone, STAGES[-1])


def test_two_runs__same_seed_same_bytes(alone, make_corpus_once, tmp_path):
    run_pretraining(load_config(PretrainConfig, [TINY]), make_corpus_once, tmp_path / "run", [STAGES[0]])
    assert last_state(tmp_path / "run", STAGES[0]) == last_state(alone, STAGES[0])
    assert trace(tmp_path / "run", STAGES[0]) == trace(alone, STAGES[0])
