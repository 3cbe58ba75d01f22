"""Several processes on one machine: one exit code, signals to all, nobody left behind. The commands here train nothing."""

import errno
import logging
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest

from meddino.distributed.exit_codes import Ending
from meddino.distributed.launcher import Signals, have_semaphores, launch, watch
from tests.processes import Started


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_launch__tells_each_process_its_place(tmp_path):
    code = (
        f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])"
    )
    assert launch([sys.executable, "-c", code], 3) == 0
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("0", "30"), ("1", "31"), ("2", "32")]


def test_launch__one_that_dies_ends_those_that_hang(tmp_path):
    # A process inside a collective of NCCL hears no signal: only SIGKILL ends it.
    code = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "0":
    pathlib.Path(r"{tmp_path}", "pid").write_text(str(os.getpid()))
    time.sleep(60)
while not pathlib.Path(r"{tmp_path}", "pid").exists(): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    begun = time.monotonic()
    assert launch([sys.executable, "-c", code], 2, grace_s=0.5) == 75
    assert time.monotonic() - begun < 20 and not is_alive(int((tmp_path / "pid").read_text()))


def test_launch__an_error_on_one_rank_is_the_launchers_code_though_its_peers_abort(tmp_path, capfd):
    # As a rank out of GPU memory ends, and its peers in NCCL's collectives.
    code = """
import os, sys, time
if os.environ["RANK"] == "1": raise MemoryError("CUDA out of memory")
time.sleep(0.3); os.abort()
"""
    assert launch([sys.executable, "-c", code], 2) == 1
    assert "MemoryError: CUDA out of memory" in capfd.readouterr().err


class Pretended:
    """Processes that end when they are killed, or after some polls."""

    def __init__(self, endings=(), ends_after=None):
        self.found, self.ends_after, self.polls, self.killed, self.signals = list(endings), ends_after, 0, False, []

    def exit_code(self):
        self.polls += 1
        ended = self.ends_after is not None and self.polls > self.ends_after
        return 137 if self.killed else 0 if ended else None

    def endings(self):
        return self.found

    def signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.killed = True


def test_watch__the_others_are_ended_a_little_after_one_has_died():
    step = Pretended([Ending("1", "n2", None, "Killed")])
    endings, because = watch(step, Signals(), 0.1, poll_s=0.01)
    assert step.killed and endings == step.found
    assert because == "others did not notice within 0.1 s"


def test_watch__a_process_that_has_saved_waits_for_the_others_without_limit():
    step = Pretended([Ending("1", "n2", 75, "...")], ends_after=40)
    assert watch(step, Signals(), 0.1, poll_s=0.01)[1] is None
    assert not step.killed


def test_watch__a_reason_to_end_ends_all_at_once():
    step = Pretended()
    assert watch(step, Signals(), reason_to_end=lambda: "n2 has gone silent", poll_s=0.01)[1] == "n2 has gone silent"
    assert step.killed


def test_watch__hands_signals_on():
    step = Pretended(ends_after=3)
    watch(step, Signals(waiting=[signal.SIGUSR1, signal.SIGTERM]), poll_s=0.01)
    assert step.signals == [signal.SIGUSR1, signal.SIGTERM]


def test_signals__are_noted_and_given_back():
    signals, before = Signals(), signal.getsignal(signal.SIGUSR1)
    with signals.noted():
        signal.raise_signal(signal.SIGUSR1)
        assert signals.waiting == [signal.SIGUSR1] and not signals.stop
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.distributed
def test_launch__an_exception_on_one_rank_is_told_at_once_while_the_other_is_in_a_collective(monkeypatch):
    started: list[Started] = []

    def forked(command, env, **_):
        started.append(Started(command, env))
        return started[-1]

    monkeypatch.setattr("meddino.distributed.launcher.subprocess.Popen", forked)
    code = """
import sys, time, torch
from meddino.core.command import command_parser, run_command
from meddino.distributed.collectives import all_reduce_sum
from meddino.distributed.process_group import start_distributed
def work(_arguments):
    with start_distributed() as place:
        all_reduce_sum(torch.ones(1))
        if place.rank == 1:
            print("raised", time.time(), file=sys.stderr, flush=True)
            raise MemoryError("out of memory on purpose")
        all_reduce_sum(torch.ones(1))
sys.exit(run_command(command_parser("toy", "toy", "toy"), [], work))
"""
    assert launch([sys.executable, "-c", code], 2, grace_s=20) == 1
    # The launcher has ended, so the other one has too; within seconds, not within the collective's ten minutes.
    ended, told = time.time(), started[1].stderr
    begun = float(told.split("raised ")[1].split()[0])
    assert "MemoryError: out of memory on purpose" in told and ended - begun < 10
    assert [each.returncode for each in started] == [75, 1] and "another one ended" in started[0].stderr


def test_have_semaphores__says_where_there_is_no_room_for_workers(monkeypatch, caplog):
    have_semaphores.cache_clear()
    assert have_semaphores(4)

    class Full:
        def Lock(self):  # noqa: N802 - multiprocessing's name
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Full())
    with caplog.at_level(logging.WARNING):
        assert not have_semaphores(5)
        assert not have_semaphores(5)
    assert caplog.text.count("--shm-size") == 1
    have_semaphores.cache_clear()
