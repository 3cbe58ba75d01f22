"""Processes of the tests: forked from one that has imported everything already, so that each starts in a tenth of a second.

A fresh interpreter that imports torch costs seconds, and tests start hundreds. What is started here is a process of its own in
every other way: its number, its environment, its folder, signals and its exit code.
"""

import atexit
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

OURS = ("meddino", "meddino_pretrain", "meddino_data_curation", "meddino_evaluation", "meddino_slurm")
# What our modules import only where they use it, and nearly every process does.
THEIRS = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "SimpleITK",
    "pydicom",
)
# A server of its own: the one of multiprocessing is the project's, with what the project has it import.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(
    [
        *THEIRS,
        *(
            module.name
            for package in OURS
            for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
            if "nnunet" not in module.name  # needs a library that is not installed here
        ),
    ]
)


class _Popen(popen_forkserver.Popen):
    """A start through this file's server."""

    def _launch(self, process_obj: BaseProcess) -> None:
        with mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            super()._launch(process_obj)


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802 - multiprocessing's name
        return _Popen(process_obj)


class Started:
    """A process that runs; the part of subprocess.Popen that tests use. What it prints goes to files.

    Args:
        words: `sys.executable` with `-c CODE` or `-m MODULE`, or the path of one of the project's commands; then its arguments.
        env: Its environment; this process's if None.
        cwd: Its folder; this process's if None.
        start_new_session: It leads a session of its own.
    """

    def __init__(
        self,
        words: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(word) for word in words]
        self._said = Path(tempfile.mkdtemp(prefix="meddino-test-process-"))
        atexit.register(shutil.rmtree, self._said, ignore_errors=True)
        given = (
            self.args,
            dict(os.environ if env is None else env),
            str(cwd or Path.cwd()),
            start_new_session,
            str(self._said),
        )
        self._process = _Process(target=_become, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What it has said on stderr so far."""
        return self._read("stderr")

    def _read(self, name: str) -> str:
        file = self._said / name
        return file.read_text(errors="replace") if file.exists() else ""

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    words: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Start a process, wait for its end, and return its exit code and what it said."""
    process = Started(words, env, cwd)
    try:
        out, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert not check or process.returncode == 0, errors[-3000:]
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, errors)


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    """Ask until it is true; a failure after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _become(words: list[str], environment: dict[str, str], cwd: str, new_session: bool, said: str) -> None:
    """Turn this fresh fork into the process that was asked for."""
    if new_session:
        os.setsid()
    # A daemon of multiprocessing may have no workers; what tests start may.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # Workers are children of the process that asks for them, as in a fresh interpreter, and not of the server.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    try:
        _execute(words)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def _execute(words: list[str]) -> None:
    """Run what an interpreter would run for these words."""
    if Path(words[0]).name.startswith("python"):
        kind, what, *rest = words[1:]
        if kind == "-m":
            sys.argv = [what, *rest]
            sys.modules.pop(what, None)  # it is run, not imported
            runpy.run_module(what, run_name="__main__", alter_sys=True)
            return
        assert kind == "-c", words
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
        return
    command = next(iter(entry_points(group="console_scripts", name=Path(words[0]).name)), None)
    if command is None or not command.value.startswith("meddino"):
        os.execvp(words[0], words)
    sys.argv = words
    raise SystemExit(command.load()())
