"""Runs that change their number of processes, are signalled on one rank, or lose a rank."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.run.signals import StopRequest
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.config import load_config
from meddino.core.errors import StoppedEarly
from tests.processes import Started

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"
BASE = [f"stages.{STAGE}.steps=9", "saving.every_steps=100"]
STOP_AT_STEP = """
    from pathlib import Path
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.run.signals import StopRequest
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config
    from meddino.core.errors import StoppedEarly
    asked = []
    StopRequest.came = lambda self: asked.append(1) or len(asked) == 1 + {after}  # before the stage, then in each step
    try:
        run_pretraining(load_config(PretrainConfig, [{recipe!r}], {overrides!r}), Path({corpus!r}), Path({run!r}), [{stage!r}])
    except StoppedEarly:
        pass
"""


def start_ranks(corpus: Path, run: Path, count: int, *overrides: str) -> list[Started]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "meddino_pretrain.cli", str(TINY), "--corpus", str(corpus), "--out", str(run), *overrides]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Started(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def wait_for_step(processes: list[Started], metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        assert all(process.poll() is None for process in processes), [process.stderr for process in processes]
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")


@pytest.mark.distributed
def test_processes__one_then_two_with_accumulation_then_one(make_corpus_once, tmp_path, run_ranks, monkeypatch):
    config = load_config(PretrainConfig, [TINY], BASE)
    run_pretraining(config, make_corpus_once, tmp_path / "alone", [STAGE])
    run = tmp_path / "changing"
    asked: list[int] = []
    monkeypatch.setattr(StopRequest, "came", lambda self: asked.append(1) or len(asked) == 1 + 3)
    with pytest.raises(StoppedEarly):
        run_pretraining(config, make_corpus_once, run, [STAGE])
    halves = [*BASE, f"stages.{STAGE}.accumulation=2"]
    run_ranks(
        STOP_AT_STEP.format(
            after=3, recipe=str(TINY), overrides=halves, corpus=str(make_corpus_once), run=str(run), stage=STAGE
        )
    )
    assert latest_checkpoint(run / STAGE / "checkpoints").step == 6
    run_pretraining(config, make_corpus_once, run, [STAGE])
    found, wanted = (read_metrics(folder / STAGE / "metrics.jsonl") for folder in (run, tmp_path / "alone"))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in wanted], rel=1e-5)
    ours, theirs = (
        read_tensors(latest_checkpoint(folder / STAGE / "checkpoints").folder, "teacher.")
        for folder in (run, tmp_path / "alone")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.distributed
def test_processes__a_signal_on_one_rank_stops_all(make_corpus_once, tmp_path):
    run = tmp_path / "run"
    processes = start_ranks(make_corpus_once, run, 2, "stages.stage1_pretrain.steps=2000", "saving.every_steps=1000")
    wait_for_step(processes, run / STAGE / "metrics.jsonl", 2)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], errors
    saved = latest_checkpoint(run / STAGE / "checkpoints")
    assert saved.meta["world_size"] == 2
    assert len(read_metrics(run / STAGE / "metrics.jsonl")) == saved.step


@pytest.mark.distributed
def test_processes__a_rank_that_dies_stops_the_others(make_corpus_once, tmp_path):
    run = tmp_path / "run"
    processes = start_ranks(make_corpus_once, run, 2, "stages.stage1_pretrain.steps=2000", "saving.every_steps=2")
    wait_for_step(processes, run / STAGE / "metrics.jsonl", 5)  # the save of step 4 began, so that of step 2 is done
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[0].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    processes[1].communicate()
    assert processes[0].returncode == 75, errors
    assert "another one ended without a word" in errors and "Traceback" not in errors
    assert latest_checkpoint(run / STAGE / "checkpoints").step >= 2


@pytest.mark.distributed
def test_processes__a_batch_that_does_not_divide_is_refused(make_corpus_once, tmp_path):
    processes = start_ranks(make_corpus_once, tmp_path / "run", 2, "stages.stage1_pretrain.global_batch=5")
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "global batch 5 does not divide over 2 processes" in errors[0]
