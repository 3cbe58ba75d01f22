import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from meddino_slurm.config import SiteConfig
from meddino_slurm.record import Lock, Record, all_attempts, note_in_run, progress, read_json
from meddino_slurm.work import Work, make_work

from meddino.core.config import load_config
from meddino.core.errors import MedDINOError


@pytest.fixture
def work(tmp_path) -> Work:
    return make_work(load_config(SiteConfig, ["site"], kind="slurm"), "pretrain", ["smoke", "--out", str(tmp_path / "run")])


def test_lock__one_holder_at_a_time_and_it_is_named(work):
    Lock(work, str(os.getpid()), "local").take()
    with pytest.raises(
        MedDINOError, match=rf"run is held by local process {os.getpid()} of .* on {socket.gethostname()} since"
    ):
        Lock(work, "12345", "local").take()


def test_lock__same_job_takes_it_again_after_a_requeue(work):
    Lock(work, "17", "local").take()
    Lock(work, "17", "local").take()
    assert read_json(work.folder / "lock-pretrain.json", {})["job_id"] == "17"


def test_lock__is_taken_over_from_a_process_that_is_gone(work):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    Lock(work, "1", "local").take()
    path = work.folder / "lock-pretrain.json"
    path.write_text(json.dumps(read_json(path, {}) | {"pid": gone.pid}))
    Lock(work, "2", "local").take()
    assert read_json(path, {})["job_id"] == "2"


def test_lock__of_another_machine_is_believed(work):
    Lock(work, "1", "local").take()
    path = work.folder / "lock-pretrain.json"
    path.write_text(json.dumps(read_json(path, {}) | {"host": "elsewhere", "pid": 1}))
    with pytest.raises(MedDINOError, match="on elsewhere"):
        Lock(work, "2", "local").take()


def test_lock__release_leaves_another_jobs_lock_alone(work):
    first = Lock(work, "1", "local")
    first.take()
    path = work.folder / "lock-pretrain.json"
    path.write_text(json.dumps(read_json(path, {}) | {"job_id": "2"}))
    first.release()
    assert path.exists()


def test_progress__is_the_highest_checkpoint_of_each_stage(tmp_path):
    assert progress(tmp_path, "pretrain") == "no checkpoint yet"
    for name in ("a/checkpoints/step-000000010", "a/checkpoints/step-000000020", "b/checkpoints/step-000000003"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-000000030.77.partial").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text("{}")
    assert progress(tmp_path, "pretrain") == "a at step 20, b at step 3"


def test_progress__of_other_commands_is_what_they_have_written(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"12345")
    (tmp_path / "half.tar.partial").write_bytes(b"1")
    (tmp_path / "run.json").write_bytes(b"{}")
    assert progress(tmp_path, "eval") == "1 files, 5 bytes"


def test_record__counts_attempts_that_started_from_the_same_place(work):
    record = Record(work)
    for at in ("step 1", "step 2", "step 2"):
        record.start("17", ["n1"], at)
        record.end("again", 75, "")
    assert record.without_progress("17", "step 2") == 2
    assert record.without_progress("17", "step 3") == 0
    assert record.without_progress("18", "step 2") == 0  # another submission starts with a clean slate
    assert [attempt["restart"] for attempt in record.attempts] == [0, 1, 2]


def test_record__an_attempt_that_never_ended_was_lost(work):
    Record(work).start("17", ["n1"], "nothing yet")
    again = Record(work)
    again.start("17", ["n2"], "nothing yet")
    assert again.attempts[0]["decision"] == "again"
    assert "lost" in again.attempts[0]["reason"]
    assert all_attempts(work.out)[-1]["nodes"] == ["n2"]


def test_record__damaged_file_is_named(work):
    work.folder.mkdir()
    (work.folder / "record-pretrain.json").write_text('{"attempts": [')
    with pytest.raises(MedDINOError, match=r"record-pretrain\.json is no JSON"):
        Record(work)


def test_note_in_run__adds_the_jobs_and_keeps_the_rest(work):
    Record(work).start("17", ["n1", "n2"], "nothing yet")
    work.out.mkdir()
    note_in_run(work)
    assert not list(work.out.iterdir())  # an empty folder is left to the command
    (work.out / "run.json").write_text('{"stages": {"a": 1}}')
    note_in_run(work)
    run = read_json(work.out / "run.json", {})
    assert run["stages"] == {"a": 1}
    (job,) = run["jobs"]
    assert (job["job_id"], job["nodes"], job["restart"]) == ("17", ["n1", "n2"], 0)
    assert job["meddino"]
    assert len(job["git_commit"] or "0" * 40) == 40
    assert (work.out / "slurm").resolve() == Path(work.folder).resolve()
