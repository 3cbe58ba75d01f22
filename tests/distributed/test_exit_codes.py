"""One judge of exit codes: the loudest cause decides."""

import signal

import pytest

from meddino.distributed.exit_codes import Ending, judge, read_return_code


def test_read_return_code__of_a_process_started_here():
    assert read_return_code(0, "here", 0) is None
    assert read_return_code(1, "here", 2) == Ending("1", "here", 2, "Exited with exit code 2")
    assert read_return_code(1, "here", -9) == Ending("1", "here", None, "SIGKILL")


def endings(*codes):
    return [Ending(str(rank), "n1", code, "...") for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "exit_code", "killed", "decision", "job_code"),
    [
        ((), 0, None, "done", 0),
        ((75, 75), 75, None, "again", 75),
        ((2, 2), 2, None, "failed", 2),
        ((2, None), 137, None, "failed", 2),  # the one that knew, and one that was shot when the others left
        ((1, 1), 1, None, "failed", 1),
        ((1, None), 137, None, "again", 75),  # its connection broke because the other was killed
        ((1, 75), 75, None, "failed", 1),
        ((1,), 137, "others did not notice", "failed", 1),
        ((), 137, "n2 has gone silent", "again", 75),
        ((75,), 137, "still running at its time limit", "again", 75),
        ((), 1, None, "again", 75),  # srun could not launch
        ((3,), 3, None, "failed", 3),
        ((130, 75), 130, None, "failed", 130),
        ((130, 1), 130, None, "failed", 130),
    ],
)
def test_judge__the_loudest_cause_decides(codes, exit_code, killed, decision, job_code):
    verdict = judge(endings(*codes), exit_code, killed)
    assert (verdict.decision, verdict.exit_code) == (decision, job_code)
    assert verdict.reason


@pytest.mark.parametrize(
    ("codes", "decision", "job_code"),
    [
        # NCCL's watchdog aborts the peers of a rank that ended with an error, such as CUDA out of memory: no reason to go on.
        ((1, -signal.SIGABRT, -signal.SIGABRT), "failed", 1),
        ((-signal.SIGABRT, 75), "again", 75),  # nobody ended with a traceback: a broken network, for example
        ((-signal.SIGKILL, -signal.SIGABRT, 1), "again", 75),  # killed from outside, the others' connections broke
        ((-signal.SIGSEGV, 75), "again", 75),
        ((-signal.SIGSEGV, 1), "failed", 1),
    ],
)
def test_judge__a_crash_is_not_a_cause_from_outside(codes, decision, job_code):
    found = [read_return_code(rank, "n1", code) for rank, code in enumerate(codes)]
    verdict = judge(found, 137)
    assert (verdict.decision, verdict.exit_code) == (decision, job_code)


def test_judge__srun_says_aborted_in_words():
    found = [Ending("0", "n1", 1, "Exited with exit code 1"), Ending("1-3", "n1", None, "Aborted (core dumped)")]
    assert judge(found, 134).exit_code == 1
