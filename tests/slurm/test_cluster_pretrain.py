"""The smoke recipe on two nodes of the local SLURM: whatever happens on the way, the weights at the end are the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.slurm.conftest import BASE, CLUSTER, PROJECT, submit, wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.timeout(900),  # generous: other work on the machine, not this, takes the time
]

# The smoke recipe with fewer steps and slices. Its LayerScale of 1e-5 makes all features nearly equal at first, and float32
# keeps two digits of what KoLeo's gradients add up to: one process and two then differ by 3e-5 in the loss after 12 steps. In
# float64 they agree to 4e-14 (docs/training.md; tests/pretrain/test_parallel.py), at three times the time.
RECIPE = (
    "smoke",
    "backbone.changes.layerscale_init=0.1",
    "stages.stage1_pretrain.steps=12",
    "stages.stage2_gram.steps=3",
    "stages.stage3_highres.steps=2",
    "stages.stage2_gram.method.gram_teacher.step=6",
    "stages.stage3_highres.method.gram_teacher.step=6",
    *(f"stages.{stage}.global_batch=8" for stage in ("stage1_pretrain", "stage2_gram", "stage3_highres")),
    "saving.every_steps=3",
    "loader.workers=0",  # what is killed and held below is to be the training process
    "saving.tensorboard=false",
)
LAST = "stage3_highres"


def words(corpus: Path, out: Path) -> tuple[str, ...]:
    return (*RECIPE, "--corpus", str(corpus), "--out", str(out))


def weights(out: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint of the last stage."""
    newest = max((out / LAST / "checkpoints").glob("step-*"))
    return {name: value for file in newest.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(out: Path, other: Path) -> None:
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different, different[:5]


def record(out: Path) -> list[dict]:
    path = Path(f"{out}.slurm") / "record-pretrain.json"
    return json.loads(path.read_text())["attempts"] if path.exists() else []


def state(out: Path) -> str:
    return submit("status", out).splitlines()[1]


def wait_for_end(out: Path, timeout_s: float = 400) -> None:
    wait_until(lambda: any(word in state(out) for word in ("COMPLETED", "FAILED", "CANCELLED")), timeout_s)
    logs = "".join(path.read_text()[-3000:] for path in sorted(Path(f"{out}.slurm").glob("*.log")))
    assert "COMPLETED" in state(out), state(out) + logs


def step_of(out: Path, stage: str = "stage1_pretrain") -> int:
    path = out / stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len(lines)


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one process on this machine, without SLURM."""
    out = tmp_path_factory.mktemp("one") / "run"
    command = [Path(sys.executable).with_name("meddino-pretrain"), RECIPE[0], "--corpus", corpus, "--out", out, *RECIPE[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=400)
    return out


@pytest.fixture(scope="module")
def undisturbed(cluster: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two nodes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "site.yaml").write_text(PROFILE)
    submit("--cluster", folder / "site.yaml", "pretrain", *words(corpus, folder / "run"))
    wait_for_end(folder / "run")
    assert len(record(folder / "run")) == 1
    return folder / "run"


PROFILE = "\n".join(
    [
        'pretrain: {time: "10", nodes: 2, tasks_per_node: 1}',
        *(f'{name}: {{time: "10"}}' for name in ("curate", "export", "eval", "study", "demo")),
        "partition: low",
        "signal_lead_s: 10",
        "node_timeout_s: 20",
        "attempts_without_progress: 5",
    ]
)


@pytest.fixture
def started(corpus: Path, tmp_path: Path, undisturbed: Path) -> Callable[..., tuple[Path, str]]:
    """Return a function that starts the run on two nodes and comes back when it has taken some steps."""

    def start(*settings: str, steps: int = 4) -> tuple[Path, str]:
        (tmp_path / "site.yaml").write_text(PROFILE)
        sets = [word for setting in settings for word in ("--set", setting)]
        submit("--cluster", tmp_path / "site.yaml", *sets, "pretrain", *words(corpus, tmp_path / "run"))
        wait_until(lambda: step_of(tmp_path / "run") >= steps, 240)
        jobs = json.loads((tmp_path / "run.slurm" / "jobs.json").read_text())["jobs"]
        return tmp_path / "run", jobs[0]["id"]

    return start


def losses(out: Path) -> np.ndarray:
    files = [out / stage / "metrics.jsonl" for stage in ("stage1_pretrain", "stage2_gram", LAST)]
    return np.array([json.loads(line)["loss"] for file in files for line in file.read_text().splitlines()])


def test_two_nodes_two_tasks__equal_one_process(one_process, undisturbed):
    np.testing.assert_allclose(losses(undisturbed), losses(one_process), rtol=1e-5)
    ours, theirs = weights(undisturbed), weights(one_process)
    assert ours.keys() == theirs.keys()
    # Of the tensors as wholes: where a gradient is next to nothing AdamW's step is a coin toss of rounding.
    far = {
        name: float(np.linalg.norm(ours[name] - value) / np.linalg.norm(value))
        for name, value in theirs.items()
        if is_weight(name)
    }
    assert max(far.values()) < 1e-5, sorted(far.items(), key=lambda item: -item[1])[:5]


def is_weight(name: str) -> bool:
    return name.startswith("teacher.") and name.endswith("weight")


def test_signal__all_save_together_and_the_job_goes_on(started, undisturbed):
    out, job = started()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for_end(out)
    first, second = record(out)
    assert "stopped at a safe point" in first["reason"]
    assert first["job_id"] == second["job_id"] == job
    # At the step at which the signal came, not at the checkpoint before.
    assert int(second["progress_at_start"].split()[-1]) >= 4
    assert_same(out, undisturbed)


def test_time_limit__requeue_and_the_same_weights(started, undisturbed):
    begin = time.monotonic()
    out, _ = started("pretrain.time='1'")
    # The run is held up, or it would be done within the minute that is SLURM's shortest limit.
    attempt, ranks = len(record(out)), trainers(out)
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: time.monotonic() - begin > 50 or len(record(out)) > attempt, 60)
    for pid in ranks.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    wait_for_end(out)
    assert len(record(out)) >= 2
    assert {each["decision"] for each in record(out)[:-1]} == {"again"}
    assert_same(out, undisturbed)


def test_preemption__by_a_high_priority_job(started, undisturbed, tmp_path):
    out, _ = started()
    command = ["sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    wait_for_end(out)
    attempts = record(out)
    assert len(attempts) >= 2
    assert attempts[0]["decision"] == "again"
    assert "stopped at a safe point" in attempts[0]["reason"]
    assert_same(out, undisturbed)


def test_task_killed__the_job_starts_from_its_last_checkpoint(started, undisturbed):
    out, _ = started()
    os.kill(trainers(out)["1"], signal.SIGKILL)
    wait_for_end(out)
    first, second = record(out)
    assert "Killed" in first["reason"]
    assert first["decision"] == "again"
    assert second["progress_at_start"].startswith("stage1_pretrain at step ")
    assert_same(out, undisturbed)


def trainers(out: Path) -> dict[str, int]:
    """The training processes of a run folder, by rank."""
    found = {}
    for pid in all_pids():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if (
                b"meddino-pretrain\0smoke" in command
                and str(out).encode() + b"\0" in command
                and not command.startswith(b"srun")
            ):
                (rank,) = (entry for entry in environment(pid) if entry.startswith(b"SLURM_PROCID="))
                found[rank.decode().split("=")[1]] = pid
    return found


def test_node_down__the_job_ends_within_a_minute_and_goes_on_when_it_can(started, undisturbed):
    out, _ = started()
    daemon = int((BASE / "run" / "slurmd-n2.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    lost = [pid for pid in all_pids() if b"SLURMD_NODENAME=n2" in environment(pid)]
    for pid in lost:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: record(out)[0]["ended"], 60)
    assert record(out)[0]["decision"] == "again"
    subprocess.run(["bash", CLUSTER / "up.sh"], check=True, capture_output=True, timeout=90, cwd=PROJECT)
    wait_for_end(out)
    assert_same(out, undisturbed)


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def test_stages__as_a_chain_of_jobs(corpus, undisturbed, tmp_path):
    (tmp_path / "site.yaml").write_text(PROFILE)
    out = tmp_path / "run"
    submit("--cluster", tmp_path / "site.yaml", "--chain-stages", "pretrain", *words(corpus, out))
    jobs = json.loads((tmp_path / "run.slurm" / "jobs.json").read_text())["jobs"]
    assert [job["depends_on"] for job in jobs] == [[], [jobs[0]["id"]], [jobs[1]["id"]]]
    wait_until(lambda: submit("status", out).count("COMPLETED") == 3, 600)
    assert_same(out, undisturbed)
