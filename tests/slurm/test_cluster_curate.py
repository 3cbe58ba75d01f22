"""Curation as an array on the local SLURM: one part killed, one cancelled, and the checksums of one process at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from meddino_slurm import slurm

from tests.slurm.conftest import submit, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]

CURATE = str(Path(sys.executable).with_name("meddino-curate"))
SITE = "\n".join(
    [
        "partition: low",
        "signal_lead_s: 10",
        "array_parallel: 3",
        *(f'{name}: {{time: "10"}}' for name in ("pretrain", "curate", "export", "eval", "study", "demo")),
    ]
)


def curate(*words: object) -> None:
    command = [CURATE, *map(str, words)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr


def checksums(corpus: Path) -> dict[str, object]:
    info = json.loads((corpus / "corpus.json").read_text())
    return {key: info[key] for key in ("content_hash", "shards", "totals")}


def jobs(corpus: Path) -> list[dict]:
    return json.loads((Path(f"{corpus}.slurm") / "jobs.json").read_text())["jobs"]


def process_of(part: str, corpus: Path) -> int | None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"python" in words[0] and part.encode() in words and str(corpus).encode() in words:
            return int(path.name)
    return None


def test_array__one_part_killed_one_cancelled_same_checksums_as_one_process(tmp_path):
    curate("phantom", "--out", tmp_path / "cohort", "--patients", 6)
    (tmp_path / "salt").write_text("a salt for this test")
    source = ("build", tmp_path / "cohort" / "ct", f"privacy.salt_file={tmp_path / 'salt'}", "workers=1")
    curate(*source, "--out", tmp_path / "alone")

    (tmp_path / "site.yaml").write_text(SITE)
    corpus = tmp_path / "corpus"
    line = ("--cluster", tmp_path / "site.yaml", "--parts", 8, "curate", *source, "--out", corpus)
    submit(*line)
    array, merge = jobs(corpus)
    assert len(array["keys"]) == 8
    assert merge["depends_on"] == [array["id"]]
    slurm.cancel([f"{array['id']}_7"])  # the last part, while it waits
    pid = None
    end = time.monotonic() + 120
    while pid is None and time.monotonic() < end:
        pid = process_of("2/8", corpus)
    os.kill(pid, signal.SIGKILL)

    wait_until(lambda: "RUNNING" not in submit("status", corpus) and "PENDING" not in submit("status", corpus), 300)
    killed = json.loads((tmp_path / "corpus.slurm" / "record-curate-2-of-8.json").read_text())["attempts"]
    assert [attempt["decision"] for attempt in killed] == ["again", "done"]
    assert "Killed" in killed[0]["reason"]
    states = submit("status", corpus)
    assert states.count("COMPLETED") == 7
    assert states.count("CANCELLED") == 2  # the part, and the merge that can never start
    assert not (corpus / "corpus.json").exists()

    # The same line again: only the part that is missing, and the merge.
    submit(*line)
    again, merge = jobs(corpus)[2:]
    assert again["keys"] == ["curate-8-of-8"]
    wait_until(lambda: submit("status", corpus).splitlines()[-2].count("COMPLETED"), 180)
    assert checksums(corpus) == checksums(tmp_path / "alone")
    curate("verify", corpus)
