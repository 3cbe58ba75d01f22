"""Runs of graph matching: killed and run again, in one process and in two, in one piece and in micro-batches."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.config import load_config
from tests.processes import Started

RECIPE = Path(__file__).with_name("tiny.yaml")
CODE = """
    from pathlib import Path
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config
    run_pretraining(load_config(PretrainConfig, [{recipe!r}]), Path({corpus!r}), Path({run!r}))
"""


def trace(run: Path) -> list[dict]:
    records = read_metrics(run / "pretrain" / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != TIMING} for record in records]


def last_state(run: Path) -> bytes:
    return (latest_checkpoint(run / "pretrain" / "checkpoints").folder / "rank-00000.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_corpus_once):
    run = tmp_path_factory.mktemp("graphs") / "run"
    run_pretraining(load_config(PretrainConfig, [RECIPE]), make_corpus_once, run)
    return run


def test_run__killed_and_run_again_is_the_same_to_the_bit(alone, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "meddino_pretrain.cli", str(RECIPE), "--corpus", str(make_corpus_once), "--out", str(run)]
    process = Started(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = run / "pretrain" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run_pretraining(load_config(PretrainConfig, [RECIPE]), make_corpus_once, run)
    assert trace(run) == trace(alone) and last_state(run) == last_state(alone)


def compare(run: Path, alone: Path) -> None:
    for found, wanted in zip(trace(run), trace(alone), strict=True):
        assert [found[key] for key in ("hamming", "accuracy")] == pytest.approx(
            [wanted[key] for key in ("hamming", "accuracy")]
        )
    ours, theirs = (
        read_tensors(latest_checkpoint(each / "pretrain" / "checkpoints").folder, "model.") for each in (run, alone)
    )
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - tensor).abs().max().item() for name, tensor in theirs.items()) < 1e-9


def test_run__micro_batches_learn_what_the_whole_batch_learns(alone, make_corpus_once, tmp_path):
    config = load_config(PretrainConfig, [RECIPE], ["stages.pretrain.accumulation=2"])
    run_pretraining(config, make_corpus_once, tmp_path / "run")
    compare(tmp_path / "run", alone)


@pytest.mark.distributed
def test_run__two_processes_learn_what_one_learns(alone, make_corpus_once, tmp_path, run_ranks):
    run_ranks(CODE.format(recipe=str(RECIPE), corpus=str(make_corpus_once), run=str(tmp_path / "run")))
    compare(tmp_path / "run", alone)
