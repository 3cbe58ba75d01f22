import pytest
from meddino_slurm.verdict import Outcome, judge, read_return_code, read_srun_line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n1: task 1: Killed", Outcome("1", "n1", None, "Killed")),
        ("srun: error: gpu-03: tasks 2-3: Exited with exit code 75", Outcome("2-3", "gpu-03", 75, "Exited with exit code 75")),
        ("srun: error: n1: task 0: User defined signal 2", Outcome("0", "n1", None, "User defined signal 2")),
        ("srun: error: n2: tasks 0,4: Out Of Memory", Outcome("0,4", "n2", None, "Out Of Memory")),
        ("srun: error: Node failure on n2", Outcome("?", "n2", None, "node failure")),
        ("srun: Force Terminated StepId=2.0", None),
        ("srun: error: Unable to create step for job 7: Job/step already completing or completed", None),
        ("slurmstepd: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-22T01:06:59 ***", None),
    ],
)
def test_read_srun_line__words_of_a_real_slurm(line, expected):
    assert read_srun_line(line) == expected


def test_read_return_code__of_a_process_started_here():
    assert read_return_code(0, "here", 0) is None
    assert read_return_code(1, "here", 2) == Outcome("1", "here", 2, "Exited with exit code 2")
    assert read_return_code(1, "here", -9) == Outcome("1", "here", None, "SIGKILL")


def outcomes(*codes):
    return [Outcome(str(rank), "n1", code, "...") for rank, code in enumerate(codes)]


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
    ],
)
def test_judge__the_loudest_cause_decides(codes, exit_code, killed, decision, job_code):
    verdict = judge(outcomes(*codes), exit_code, killed)
    assert (verdict.decision, verdict.exit_code) == (decision, job_code)
    assert verdict.reason
