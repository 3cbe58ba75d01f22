"""What each fault does to a pretraining, as the table in docs/training.md has it; nothing that was saved is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from meddino_pretrain.monitoring.metrics import read_metrics

from meddino.checkpoints.state.verify import latest_checkpoint
from tests.pretrain.conftest import make_corpus_once  # noqa: F401 - a fixture
from tests.pretrain.test_launcher import STAGE, TINY, children, wait_until

ALONE = [sys.executable, "-m", "meddino_pretrain.cli", str(TINY), "--stage", STAGE]
STEPS = [f"stages.{STAGE}.snapshot_steps=[]", "saving.every_steps=2", "loader.workers=1"]
# Fault: (signal, whom it reaches, exit code).
FAULTS = {
    "a closed terminal": (signal.SIGHUP, "all", 75),
    "a scheduler's end": (signal.SIGTERM, "all", 75),
    "SLURM's warning": (signal.SIGUSR1, "all", 75),
    "Ctrl-C": (signal.SIGINT, "all", 130),
    "killed": (signal.SIGKILL, "trainer", -signal.SIGKILL),
    "a worker killed": (signal.SIGKILL, "workers", 75),
}


@pytest.mark.parametrize(
    "name", [name if name == "a closed terminal" else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_pretrain__each_fault_ends_as_the_table_says(make_corpus_once, tmp_path, name):  # noqa: F811
    number, whom, code = FAULTS[name]
    run, errors = tmp_path / "run", tmp_path / "stderr"
    metrics = run / STAGE / "metrics.jsonl"
    command = [*ALONE, "--corpus", str(make_corpus_once), "--out", str(run), *STEPS, f"stages.{STAGE}.steps=4000"]

    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with errors.open("w") as stream:
        trainer = subprocess.Popen(command, env={**clean, "OMP_NUM_THREADS": "1"}, stderr=stream, start_new_session=True)
        wait_until(
            lambda: trainer.poll() is not None or (metrics.is_file() and '"step": 5,' in metrics.read_text())
        )  # that of step 2 is saved
        workers = children(trainer.pid)
        try:
            for pid in {"all": [*workers, trainer.pid], "trainer": [trainer.pid], "workers": workers[:1]}[whom]:
                os.kill(pid, number)
            assert trainer.wait(timeout=100) == code, Path(errors).read_text()
        finally:
            trainer.kill()
    assert "Traceback" not in errors.read_text()
    done = latest_checkpoint(run / STAGE / "checkpoints").step
    assert done >= 2
    if code == 75 and whom == "all":
        assert done == len(read_metrics(metrics))  # not one step is lost
