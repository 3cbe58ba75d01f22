"""What srun says about the end of its tasks."""

import pytest
from meddino_slurm.steps import read_srun_line

from meddino.distributed.exit_codes import Ending


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n1: task 1: Killed", Ending("1", "n1", None, "Killed")),
        ("srun: error: gpu-03: tasks 2-3: Exited with exit code 75", Ending("2-3", "gpu-03", 75, "Exited with exit code 75")),
        ("srun: error: n1: task 0: User defined signal 2", Ending("0", "n1", None, "User defined signal 2")),
        ("srun: error: n2: tasks 0,4: Out Of Memory", Ending("0,4", "n2", None, "Out Of Memory")),
        ("srun: error: Node failure on n2", Ending("?", "n2", None, "node failure")),
        ("srun: Force Terminated StepId=2.0", None),
        ("srun: error: Unable to create step for job 7: Job/step already completing or completed", None),
        ("slurmstepd: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-22T01:06:59 ***", None),
    ],
)
def test_read_srun_line__words_of_a_real_slurm(line, expected):
    assert read_srun_line(line) == expected
