"""Jobs on the local SLURM, with stand-ins for the commands: states, requeues, locks, what is refused."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from meddino_slurm import slurm

from tests.slurm.conftest import submit, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]


def record(out: Path, key: str = "pretrain") -> list[dict]:
    path = Path(f"{out}.slurm") / f"record-{key}.json"
    return json.loads(path.read_text())["attempts"] if path.exists() else []


def states(out: Path) -> list[str]:
    return [line.split("  ")[2].strip() for line in columns(out)]


def columns(out: Path) -> list[str]:
    lines = submit("status", out).splitlines()[1:-1]
    return [re.sub(r" {2,}", "  ", line) for line in lines]


def job_id(out: Path) -> str:
    return json.loads((Path(f"{out}.slurm") / "jobs.json").read_text())["jobs"][-1]["id"]


def start(site, standin, out: Path, *words: object, **keys: object) -> str:
    submit("--cluster", site(**keys, **standin), "pretrain", *words, "--out", out)
    return job_id(out)


@pytest.fixture(params=["with accounting", "without accounting"])
def accounting(request, standin, monkeypatch):
    """Where a site keeps no accounting, sacct says so and fails; squeue and scontrol have to do."""
    if request.param == "without accounting":
        sacct = Path(os.environ["PATH"].split(":")[0]) / "sacct"
        sacct.write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
        sacct.chmod(0o755)
    return request.param


def test_status__is_right_in_every_state(site, standin, accounting, tmp_path):
    done, failed, waits, runs = (tmp_path / name for name in ("done", "failed", "waits", "runs"))
    start(site, standin, runs, "wait")
    submit("--cluster", site(**standin), "--after", runs, "pretrain", "code", 0, "--out", waits)
    start(site, standin, done, "code", 0)
    start(site, standin, failed, "code", 2)
    wait_until(lambda: states(done) == ["COMPLETED"] and states(failed) == ["FAILED"])
    assert "wrong input, see the log: rank 0 on n" in submit("status", failed)
    wait_until((runs / "waiting-0").exists)
    assert states(runs) == ["RUNNING"]
    assert states(waits) == ["PENDING"]
    assert "waits: Dependency" in submit("status", waits)
    submit("cancel", runs)
    wait_until(lambda: states(runs) == ["CANCELLED"])
    # What waited for it can never start.
    wait_until(lambda: states(waits) == ["CANCELLED"], 90)
    assert len(record(runs)) == 1  # nobody requeued what a person cancelled


def test_status__of_a_job_that_slurm_has_forgotten(site, standin, tmp_path, monkeypatch):
    out = tmp_path / "run"
    start(site, standin, out, "code", 0)
    wait_until(lambda: states(out) == ["COMPLETED"])
    for name in ("squeue", "sacct", "scontrol"):
        shim = tmp_path / "bin" / name
        shim.write_text("#!/bin/sh\nexit 1\n")
        shim.chmod(0o755)
    assert states(out) == ["COMPLETED"]


def test_status__of_jobs_that_slurm_ended_unheard(site, standin, tmp_path):
    """Jobs that SLURM may not requeue, and whose supervisor is held still so that it cannot ask for it."""
    late, pushed, lost = (tmp_path / name for name in ("late", "pushed", "lost"))
    job = start_frozen(site, standin, late, "n1")
    scontrol("update", f"jobid={job}", "timelimit=1")
    start_frozen(site, standin, pushed, "n2")
    more_urgent = ["sbatch", "--parsable", "-p", "high", "-w", "n2", "--exclusive", "-o", "/dev/null", "--wrap", "true"]
    subprocess.run(more_urgent, check=True, capture_output=True, cwd=tmp_path)
    wait_until(lambda: states(pushed) == ["PREEMPTED"], 90)
    job = start_frozen(site, standin, lost, "n2")
    scontrol("suspend", job)
    assert states(lost) == ["SUSPENDED"]
    scontrol("resume", job)
    try:
        scontrol("update", "nodename=n2", "state=down", "reason=test")
        wait_until(lambda: states(lost) == ["NODE_FAIL"], 60)
    finally:  # refused if the node has come back by itself
        subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False, capture_output=True)
    wait_until(lambda: states(late) == ["TIMEOUT"], 150)


def start_frozen(site, standin, out: Path, node: str) -> str:
    """Start a job on a node that SLURM may not requeue, and hold all its processes still."""
    job = start(site, standin, out, "wait", sbatch=f"{{nodelist: {node}}}")
    wait_until((out / "waiting-0").exists)
    scontrol("update", f"jobid={job}", "requeue=0")
    for pid in processes_on(node, job, with_daemons=False):  # or SLURM could not end the job either
        os.kill(pid, signal.SIGSTOP)
    return job


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


def test_again__is_requeued_under_the_same_id_until_it_is_done(site, standin, tmp_path):
    out = tmp_path / "run"
    job = start(site, standin, out, "climb", 2)
    wait_until(lambda: states(out) == ["COMPLETED"])
    attempts = record(out)
    assert [(each["job_id"], each["restart"], each["decision"]) for each in attempts] == [(job, 0, "again"), (job, 1, "done")]
    run = json.loads((out / "run.json").read_text())
    assert [each["nodes"] for each in run["jobs"]] == [each["nodes"] for each in attempts]
    assert run["stages"] == {}
    assert (out / "slurm" / f"{job}.pretrain.rank-0.log").read_text().count("says climb") == 2


def test_again__gives_up_after_n_requeues_without_progress(site, standin, tmp_path):
    out = tmp_path / "run"
    start(site, standin, out, "code", 75, attempts_without_progress=2)
    wait_until(lambda: states(out) == ["FAILED"])
    assert len(record(out)) == 2
    assert "gave up after 2 attempts without progress" in submit("status", out)


def test_tasks__get_rank_size_and_one_place_to_meet_from_slurm(site, standin, tmp_path):
    from meddino.distributed.process_group import Distributed, read_environment

    out = tmp_path / "run"
    start(site, standin, out, "environment", nodes=2, tasks=2)
    wait_until(lambda: states(out) == ["COMPLETED"])
    tasks = [json.loads((out / f"environment-{rank}.json").read_text()) for rank in range(4)]
    assert [read_environment(task) for task in tasks] == [Distributed(rank, 4, rank % 2) for rank in range(4)]
    assert {task["MASTER_ADDR"] for task in tasks} == {"n1"}
    assert len({task["MASTER_PORT"] for task in tasks}) == 1
    assert {task["OMP_NUM_THREADS"] for task in tasks} == {"1"}


def test_gpus__are_asked_for_and_seen(site, standin, tmp_path):
    out = tmp_path / "run"
    submit("--cluster", site(**standin), "--set", "pretrain.gpus_per_node=2", "pretrain", "environment", "--out", out)
    wait_until(lambda: states(out) == ["COMPLETED"])
    assert json.loads((out / "environment-0.json").read_text())["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_task_killed__ends_the_others_and_is_requeued(site, standin, tmp_path):
    out = tmp_path / "run"
    start(site, standin, out, "die", nodes=2)
    wait_until(lambda: states(out) == ["COMPLETED"], 90)
    first, second = record(out)
    assert "rank 1 on n2: Killed" in first["reason"]
    assert (first["decision"], second["decision"]) == ("again", "done")


def test_lock__a_second_job_on_a_run_folder_is_refused(site, standin, tmp_path):
    out = tmp_path / "run"
    first = start(site, standin, out, "wait")
    answer = submit("--cluster", site(**standin), "pretrain", "wait", "--out", out, check=False)
    assert answer.startswith(f"2 meddino-submit: error: {out} is held by SLURM job {first} (pretrain run, ")
    wait_until((out / "waiting-0").exists)
    # One that comes in past the submission's own check finds the lock.
    (tmp_path / "run.slurm" / "jobs.json").unlink()
    words = ("--cluster", site(**standin), "--executor", "debug", "pretrain", "wait", "--out", out)
    answer = submit(*words, check=False)
    assert f"run is held by SLURM job {first} of " in answer
    assert answer.startswith("2 ")
    slurm.cancel([first])


def test_node_that_freezes__is_noticed_and_the_job_starts_anew(site, standin, tmp_path):
    """A machine without power sends no farewell: everything of the job on it stops answering."""
    out = tmp_path / "run"
    job = start(site, standin, out, "wait", nodes=2)
    wait_until((out / "waiting-1").exists)
    wait_until(lambda: len(processes_on("n2", job)) >= 2)
    time.sleep(7)  # the heartbeats have been heard
    frozen = processes_on("n2", job)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: len(record(out)) >= 2 or record(out)[0]["ended"], 60)
        assert "n2 has gone silent" in record(out)[0]["reason"]
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    slurm.cancel([job])


def processes_on(node: str, job: str, with_daemons: bool = True) -> list[int]:
    """The processes of a job's steps on one of the two nodes of this machine, and their slurmstepd."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        own = f"SLURM_JOB_ID={job}".encode() in environment and f"SLURMD_NODENAME={node}".encode() in environment
        daemon = command.startswith(b"slurmstepd: [" + job.encode() + b".")
        if (own and not daemon) or (with_daemons and daemon and daemon_of(path) == node):
            found.append(int(path.name))
    return found


def daemon_of(path: Path) -> str | None:
    """The node whose slurmd started a slurmstepd, by the children that carry its name."""
    for child in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{path.name}\n" in (child / "status").read_text():
                for word in (child / "environ").read_bytes().split(b"\0"):
                    if word.startswith(b"SLURMD_NODENAME="):
                        return word[16:].decode()
        except OSError:
            continue
    return None


def test_bad_input__unknown_partition(site, standin, tmp_path):
    words = ("--cluster", site(partition="lwo", **standin), "pretrain", "wait", "--out", tmp_path / "run")
    answer = submit(*words, check=False)
    assert answer == "2 meddino-submit: error: SLURM has no partition 'lwo'; did you mean 'low'? known: high, low"


def test_bad_input__what_sbatch_refuses_is_told_in_its_words(site, standin, tmp_path):
    profile = site(sbatch="{reservation: nobody-made-it}", **standin)
    answer = submit("--cluster", profile, "pretrain", "wait", "--out", tmp_path / "run", check=False)
    assert answer == (
        "2 meddino-submit: error: SLURM refuses the job: Batch job submission failed: Requested reservation is invalid"
    )


def test_bad_input__slurm_that_does_not_answer(site, standin, tmp_path):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text("#!/bin/sh\necho slurm_load_partitions: Unable to contact slurm controller >&2\nexit 1\n")
    sinfo.chmod(0o755)
    answer = submit("--cluster", site(**standin), "pretrain", "wait", "--out", tmp_path / "run", check=False)
    assert answer.startswith("2 meddino-submit: error: SLURM does not answer: slurm_load_partitions: Unable to contact")
    assert "\n" not in answer
