"""A command with one fault in it: a signal or a full disk at a chosen write, a small /dev/shm, a worker that is killed.

Every file that a command writes for good is fsynced, so the n-th fsync is a place in its work, the same on every machine. A
command that only reads has its place at the n-th file that it opens, and the demo in a step that it runs.
"""

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
_PRIVATE = (1 << 18) | (1 << 14)  # MS_PRIVATE, MS_REC
Hook = Callable[[int], None]


def run_with_fault(fault: str, place: int, count: Path, words: list[str]) -> int:
    """Run a command of the project in this process.

    Args:
        fault: "none", the name of a signal, "full disk", "small /dev/shm", "worker killed", or "few files".
        place: The write, from 1, at which it happens, where it happens at a write.
        count: Gets the number of writes.
        words: The command.
    """
    hooks: dict[str, Hook] = {"full disk": _no_space, "worker killed": _kill_worker}
    if fault == "small /dev/shm":
        mount_small("/dev/shm", 8192)
    if fault == "few files":
        few = max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if fault == "worker killed" and words[0] == "meddino-curate":
        _kill_reader(count.with_suffix(".once"))
    hook = hooks.get(fault) or (_signal_at(fault) if fault.startswith("SIG") else lambda descriptor: None)
    if words[0] == "meddino-demo":
        os.environ["XDG_CONFIG_HOME"] = str(Path(words[2]).parent / "home")  # its salt, the same for all trials
        _short_demo(hook if fault.startswith("SIG") else lambda descriptor: None)
        place, hook = (1, hook) if fault == "full disk" else (0, hook)
    written = _at_open(place, hook) if words[:2] == ["meddino-curate", "verify"] else _at_write(place, hook)
    main = next(iter(entry_points(group="console_scripts", name=words[0]))).load()
    try:
        code: int = main(words[1:])
    finally:
        count.write_text(str(written["count"]))
    return code


def mount_small(folder: str, size: int) -> None:
    """Give this process a file system of its own, of so many bytes, at a folder.

    Raises:
        PermissionError: It may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={size}".encode()
    for done in (
        libc.unshare(_NEW_MOUNTS),
        libc.mount(b"none", b"/", None, _PRIVATE, None),
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options),
    ):
        if done != 0:
            raise PermissionError(ctypes.get_errno(), "no mounts of its own")


def _at_write(place: int, hook: Hook) -> dict[str, int]:
    plain, own, written = os.fsync, os.getpid(), {"count": 0}

    def fsync(descriptor: int) -> None:
        if os.getpid() == own:
            written["count"] += 1
            if written["count"] == place:
                hook(descriptor)
        plain(descriptor)

    os.fsync = fsync
    return written


def _at_open(place: int, hook: Hook) -> dict[str, int]:
    """Count the files of the folder of work that are opened."""
    own, here, opened = os.getpid(), Path.cwd(), {"count": 0}

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and os.getpid() == own and here in (here / os.fsdecode(str(arguments[0]))).parents:
            opened["count"] += 1
            if opened["count"] == place:
                hook(0)

    sys.addaudithook(heard)
    return opened


def _short_demo(hook: Hook) -> None:
    """Let the demo curate and pretrain only, little, and meet the fault once it pretrains."""
    from meddino import demo, demo_report
    from meddino.core.files import write_text

    recipe = ("stages.stage1_pretrain.steps=16", "--stage", "stage1_pretrain")
    plain, status, seen = demo.Plan.steps, demo._status, []

    def steps(plan: demo.Plan) -> list[demo.Step]:
        curate, pretrain = (step.command for step in plain(plan)[:2])
        tiny = (pretrain[0], str(Path(__file__).parents[1] / "pretrain" / "tiny.yaml"), *pretrain[2:], *recipe)
        return [demo.Step("curate", "curate", (*curate, "workers=1")), demo.Step("pretrain", "pretrain", tiny)]

    def polled(log: Path, seconds: float) -> Any:
        if log not in seen and "INFO" in log.read_text():
            seen.append(log)
            if len(seen) == 2:
                hook(0)
        return status(log, seconds)

    demo.Plan.steps, demo._status = steps, polled  # type: ignore[method-assign]
    demo_report.read_summary = lambda *_: None  # type: ignore[assignment,return-value]
    demo_report.print_table = lambda *_: None  # type: ignore[assignment]
    # The one file that it writes itself, beside its salt.
    demo_report.write_report = lambda out, *_: write_text(out / "report.html", "")


def _signal_at(name: str) -> Hook:
    number = getattr(signal, name)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)  # ignored where the tests run in the background of a shell

    def hook(descriptor: int) -> None:
        # A terminal and a scheduler signal the workers too.
        for worker in multiprocessing.active_children() if number != signal.SIGKILL else ():
            os.kill(worker.pid or 0, number)
        os.kill(os.getpid(), number)

    return hook


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path(f"/proc/self/fd/{descriptor}").readlink()))


def _kill_worker(descriptor: int) -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()


def _kill_reader(once: Path) -> None:
    """Let the first process of a curation that reads a volume be killed, once."""
    from meddino_data_curation import worker_pool

    os.environ["TEST_KILLED_ONCE"] = str(once)
    worker_pool._work = work_killed_once


def work_killed_once(job: Any) -> str:
    """Do a volume; the first process that is asked to is killed as by a kernel without memory."""
    from meddino_data_curation import worker_pool

    try:
        Path(os.environ["TEST_KILLED_ONCE"]).touch(exist_ok=False)
    except FileExistsError:
        return worker_pool.curate_volume(job, worker_pool._told["config"], worker_pool._told["work"])
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def main() -> int:
    """Run what the arguments say: fault, place, file for the count, command."""
    fault, place, count, *words = sys.argv[1:]
    return run_with_fault(fault, int(place), Path(count), words)
