"""The supervisor with stand-ins for the commands, on this machine without SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from meddino_slurm import supervisor
from meddino_slurm.config import SiteConfig
from meddino_slurm.steps import Heartbeats
from meddino_slurm.work import make_work

from meddino.core.config import load_config
from tests.processes import run as run_process
from tests.slurm.conftest import SUBMIT, UNCHECKED, submit, wait_until


def record(out: Path, key: str = "pretrain") -> list[dict]:
    return json.loads((Path(f"{out}.slurm") / f"record-{key}.json").read_text())["attempts"]


def run_here(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [*UNCHECKED, "--cluster", str(site), "--executor", "debug", "pretrain", *map(str, words)]
    return run_process(command, timeout=120)


def test_debug__runs_in_the_foreground_and_ends_with_the_commands_code(site, standin, tmp_path):
    for code in (0, 1, 2):
        out = tmp_path / f"run{code}"
        run = run_here(site(**standin), "code", code, "--out", out)
        assert run.returncode == code, run.stderr
        assert "rank 0 says code" in run.stdout
        assert record(out)[-1]["exit_code"] == code


def test_again__is_run_again_until_it_is_done(site, standin, tmp_path):
    run = run_here(site(**standin), "climb", 3, "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    attempts = record(tmp_path / "run")
    assert [attempt["decision"] for attempt in attempts] == ["again", "again", "done"]
    assert [attempt["restart"] for attempt in attempts] == [0, 1, 2]
    assert attempts[2]["progress_at_start"] == "stage1_pretrain at step 2"


def test_again__gives_up_after_n_attempts_without_progress(site, standin, tmp_path):
    run = run_here(site(attempts_without_progress=2, **standin), "code", 75, "--out", tmp_path / "run")
    assert run.returncode == 75
    attempts = record(tmp_path / "run")
    assert len(attempts) == 2
    assert attempts[-1]["reason"].startswith("gave up after 2 attempts without progress")
    assert not (tmp_path / "run.slurm" / "lock-pretrain.json").exists()


def test_local__two_processes_get_their_rank_and_a_place_to_meet(site, standin, tmp_path):
    out = tmp_path / "run"
    submit("--cluster", site(nodes=4, tasks=2, **standin), "--executor", "local", "pretrain", "environment", "--out", out)
    wait_until(lambda: "COMPLETED" in submit("status", out))
    ranks = [json.loads((out / f"environment-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["RANK"] for rank in ranks] == [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}  # one machine instead of four
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {"1"}
    assert not any(name.startswith("SUBMITIT_") for name in ranks[0])


class Silent(Heartbeats):
    def __init__(self):
        pass

    def silent_node(self):
        return "n2"


@pytest.mark.parametrize(
    ("beats", "end_in_s", "because"),
    [
        (None, None, None),
        (None, 3600, None),
        (None, 0, "still running at its time limit"),
        (Silent(), None, "n2 has gone silent"),
    ],
    ids=["no limit", "time left", "time over", "silent"],
)
def test_reason_to_end__a_silent_machine_or_the_time_limit(beats, end_in_s, because):
    end_s = None if end_in_s is None else time.time() + end_in_s
    assert supervisor._reason_to_end(beats, end_s) == because


@pytest.mark.parametrize(
    ("n1", "n2", "runs", "silent"),
    [(0, 60, True, "n2"), (0, 0, True, None), (60, 60, True, None), (0, 60, False, None)],
)
def test_heartbeats__only_a_machine_that_alone_is_silent(make_heartbeats, n1, n2, runs, silent):
    assert make_heartbeats({"n1": n1, "n2": n2}, runs).silent_node() == silent


@pytest.fixture
def make_heartbeats(tmp_path):
    def make(silent_for_s, runs):
        site = load_config(SiteConfig, ["site"], kind="slurm")
        beats = Heartbeats(make_work(site, "pretrain", ["smoke", "--out", str(tmp_path / "run")]))
        beats._last = {node: time.monotonic() - seconds for node, seconds in silent_for_s.items()}
        beats._process = SimpleNamespace(poll=lambda: None if runs else 1)
        return beats

    return make


def test_local__cancel_status_logs_and_the_lock(site, standin, tmp_path):
    out, profile = tmp_path / "run", site(**standin)
    line = ("--cluster", profile, "--executor", "local", "pretrain", "wait", "--out", out)
    submit(*line)
    wait_until((out / "waiting-0").exists)
    assert "RUNNING" in submit("status", out)
    refused = submit(*line, check=False)
    assert refused.startswith("2 meddino-submit: error: run is held by local process")
    assert "rank 0 says wait" in submit("logs", out)
    assert "attempt 1" in submit("logs", out, "--rank", "supervisor")
    assert "no log of rank 7" in submit("logs", out, "--rank", 7, check=False)
    submit("cancel", out)
    wait_until(lambda: "RUNNING" not in submit("status", out))
    assert "CANCELLED" in submit("status", out)
    assert "no job waits or runs" in submit("cancel", out, check=False)
    # The same line again goes on from the checkpoint that the signal left behind.
    submit(*line)
    wait_until(lambda: "COMPLETED" in submit("status", out))


def test_local__signal_is_passed_on_and_ends_the_job(site, standin, tmp_path):
    out = tmp_path / "run"
    submit("--cluster", site(**standin), "--executor", "local", "pretrain", "wait", "--out", out)
    wait_until((out / "waiting-0").exists)
    lock = json.loads((tmp_path / "run.slurm" / "lock-pretrain.json").read_text())
    os.kill(lock["pid"], signal.SIGUSR2)
    wait_until(lambda: "RUNNING" not in submit("status", out))
    assert record(out)[-1]["exit_code"] == 75
    assert (out / "stage1_pretrain" / "checkpoints" / "step-000000001").is_dir()


def test_logs__follow_ends_with_the_job(site, standin, tmp_path):
    out = tmp_path / "run"
    submit("--cluster", site(**standin), "--executor", "local", "pretrain", "climb", 2, "--out", out)
    run = subprocess.run([*SUBMIT, "logs", str(out), "-f"], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.count("rank 0 says climb") == 2


def test_wrong_input__another_recipe_on_the_same_folder(site, standin, tmp_path):
    out, profile = tmp_path / "run", site(**standin)
    assert run_here(profile, "code", 0, "--out", out).returncode == 0
    run = run_here(profile, "climb", 3, "--out", out)
    assert run.returncode == 2
    assert "belongs to another run: it was started with 'meddino-submit pretrain code 0" in run.stderr


def test_wrong_input__nothing_submitted(tmp_path):
    for command in ("status", "logs", "cancel"):
        assert "no job was ever submitted for" in submit(command, tmp_path / "nothing", check=False)


def test_without_slurm__says_so_and_offers_local(site, tmp_path):
    only_python = {**os.environ, "PATH": str(Path(sys.executable).parent)}
    answer = submit("--cluster", site(), "pretrain", "smoke", "--out", tmp_path / "run", check=False, env=only_python)
    assert answer.startswith("2 meddino-submit: error: there is no SLURM on this machine (no sbatch in PATH)")
    assert "--executor local" in answer
    assert not (tmp_path / "run.slurm").exists()


def test_local__refuses_what_needs_a_queue(site, tmp_path):
    line = ("--cluster", site(), "--executor", "local", "--parts", 3, "curate", "build", "s", "--out", tmp_path / "c")
    assert "runs one job on this machine" in submit(*line, check=False)
