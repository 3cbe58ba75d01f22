"""Several processes on one machine: one exit code, signals to all, nobody left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.monitoring.metrics import read_metrics

from meddino.checkpoints.state.verify import latest_checkpoint
from tests.processes import Started, children, is_alive, wait_until

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"
LONG = [f"stages.{STAGE}.steps=5000", "saving.every_steps=5000", f"stages.{STAGE}.snapshot_steps=[]"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "meddino_pretrain.cli"]
OURS = [sys.executable, "-m", "meddino_pretrain.cli", "--processes", "2"]


def start(how: list[str], corpus: Path, run: Path) -> Started:
    arguments = [str(TINY), "--corpus", str(corpus), "--out", str(run), "--stage", STAGE, *LONG]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return Started([*how, *arguments], env={**clean, "OMP_NUM_THREADS": "1"})


def train_until_signalled(how: list[str], number: int, corpus: Path, run: Path) -> int:
    """Start two ranks, signal their launcher in the third step, and return its exit code once nobody is left."""
    launcher, metrics = start(how, corpus, run), run / STAGE / "metrics.jsonl"
    wait_until(lambda: launcher.poll() is not None or (metrics.is_file() and '"step": 3,' in metrics.read_text()))
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    launcher.send_signal(number)
    code = launcher.wait(timeout=60)
    wait_until(lambda: not any(is_alive(rank) for rank in ranks), 60)
    # Not one step is lost.
    assert latest_checkpoint(run / STAGE / "checkpoints").step == len(read_metrics(metrics)) >= 3
    return code


@pytest.mark.distributed
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_processes__a_signal_to_the_launcher_saves_and_asks_to_be_run_again(make_corpus_once, tmp_path, number):
    assert train_until_signalled(OURS, number, make_corpus_once, tmp_path / "run") == 75


@pytest.mark.distributed
@pytest.mark.parametrize(
    "how",
    [pytest.param(OURS, id="ours"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)],
)
def test_processes__without_their_launcher_they_save_and_end(make_corpus_once, tmp_path, how):
    assert train_until_signalled(how, signal.SIGKILL, make_corpus_once, tmp_path / "run") == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGUSR1, -signal.SIGUSR1)])
def test_processes__under_torchrun_all_is_saved_but_nobody_says_75(make_corpus_once, tmp_path, number, code):
    # What docs/training.md says of torchrun; should it ever hand 75 on, the documents may say so.
    assert train_until_signalled(TORCHRUN, number, make_corpus_once, tmp_path / "run") == code


@pytest.mark.parametrize(
    ("processes", "rank", "words"),
    [("0", None, "--processes 0 must be at least 1"), ("2", "0", "torchrun or srun has started this process")],
)
def test_processes__wrong_number(make_corpus_once, tmp_path, monkeypatch, capsys, processes, rank, words):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main([str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path), "--processes", processes]) == 2
    assert words in capsys.readouterr().err


def test_start__a_signal_while_starting_asks_to_be_run_again(make_corpus_once, tmp_path):
    # As early as Python's own start allows: before torch is imported, long before the first step.
    code = f"""
import os, signal, sys
class Kill:
    def find_spec(self, name, *rest):
        if name == "torch": sys.meta_path.remove(self); os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Kill())
from meddino_pretrain.cli import main
sys.exit(main({[str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run")]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "stopped by a signal before stage1_pretrain" in done.stderr
    assert not (tmp_path / "run" / STAGE).exists()
