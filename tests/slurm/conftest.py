"""The local SLURM, a site profile for it, and a tiny corpus."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import run as run_process

PROJECT = Path(__file__).resolve().parents[2]
CLUSTER = PROJECT / "slurm" / "test_cluster"
BASE = Path(os.environ.get("MEDDINO_SLURM", "/var/tmp/meddino-slurm"))
SUBMIT = [sys.executable, "-m", "meddino_slurm.cli"]
UNCHECKED = [*SUBMIT, "--unchecked"]  # where a test is about the job and its recipe and corpus are none
RESOURCES = '{{time: "10", nodes: {nodes}, tasks_per_node: {tasks}, cpus_per_task: 1, partition: null}}'


def wait_until(what: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Ask twice a second until it is true."""
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.5)


def submit(
    *words: object, cwd: Path | None = None, check: bool = True, env: dict[str, str] | None = None, checked: bool = False
) -> str:
    """Run `meddino-submit`; returns what it prints."""
    command = [*(SUBMIT if checked else UNCHECKED), *map(str, words)]
    run = run_process(command, cwd=cwd, timeout=120, env=env)
    assert not check or run.returncode == 0, run.stderr
    return run.stdout if check else f"{run.returncode} {run.stderr.strip()}"


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a site profile."""

    def write(nodes: int = 1, tasks: int = 1, **keys: object) -> Path:
        path = tmp_path / "site.yaml"
        resources = RESOURCES.format(nodes=nodes, tasks=tasks)
        lines = [
            f"pretrain: {resources}",
            *(f'{name}: {{time: "10"}}' for name in ("curate", "export", "eval", "study", "demo")),
        ]
        settings = {"signal_lead_s": 10, "node_timeout_s": 15, **keys}
        path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in settings.items())]) + "\n")
        return path

    return write


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Put a stand-in for the container runtime first in PATH; returns the profile's key that uses it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "apptainer"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("standin.py")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return {"container": "{image: stand-in.sif}"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The local SLURM, brought up if it is not. A failure here fails the tests: they are not skipped."""
    run = subprocess.run(["bash", CLUSTER / "up.sh"], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, f"the local SLURM did not start:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    os.environ["SLURM_CONF"] = str(BASE / "etc" / "slurm.conf")
    yield
    subprocess.run(["scancel", "--user=root"], check=False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 32 slices."""
    spec = importlib.util.spec_from_file_location("tiny_corpus", PROJECT / "tests" / "pretrain" / "conftest.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    return writer.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", [writer.disc_slice(i, 96, 80) for i in range(32)])
