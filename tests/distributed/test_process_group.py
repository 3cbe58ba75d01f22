"""What the launcher's environment says."""

import pytest

from meddino.core.errors import ConfigError
from meddino.distributed.process_group import (
    Distributed,
    check_one_process_a_gpu,
    first_host,
    processes_here,
    read_environment,
)


def test_read_environment__alone():
    assert read_environment({}) == Distributed(0, 1, 0)


def test_read_environment__torchrun():
    assert read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Distributed(3, 4, 1)


def test_read_environment__srun_step():
    assert read_environment({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}) == Distributed(5, 8, 1)


def test_read_environment__a_batch_script_is_alone():
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}) == Distributed()


@pytest.mark.parametrize("environment", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}])
def test_read_environment__nonsense_is_named(environment):
    with pytest.raises(ConfigError, match="RANK="):
        read_environment(environment)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # a batch script is alone
    ],
)
def test_processes_here__of_this_machine(environment, count):
    assert processes_here(environment) == count


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-005,9],login", "gpu003"), ("a[1-2]b,c", "a1b"), ("gpu-07", "gpu-07")],
)
def test_first_host__of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_check_one_process_a_gpu__names_the_ranks_that_share_one(monkeypatch):
    def seen(*everyone):
        monkeypatch.setattr("meddino.distributed.process_group.all_gather_strings", lambda own: list(everyone))
        check_one_process_a_gpu(everyone[0])

    seen("a GPU-0", "a GPU-1", "b GPU-0")
    seen("", "")  # processes on CPUs share machines
    with pytest.raises(ConfigError, match=r"processes \[0, 2\] share one GPU \(a GPU-0\)"):
        seen("a GPU-0", "a GPU-1", "a GPU-0")
