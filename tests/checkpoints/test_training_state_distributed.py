"""What two processes save, one loads, and the other way round: replicated (DDP) and sharded (FSDP2) state."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from meddino.checkpoints.state import safetensors_storage
from meddino.checkpoints.state.flat_state import OptimizerState, flatten, written_here
from meddino.checkpoints.state.training_state import load_training_state, save_training_state
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.errors import CheckpointError

pytestmark = pytest.mark.distributed


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False))  # odd sizes: uneven shards


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"student": model, "optimizer": OptimizerState("optimizer", optimizer, model), "seen": {"samples": 12}}


def _start(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    try:
        for writer, reader in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
            _save(folder / writer, writer)
            _load(folder / writer, reader)
        for failing_rank in (0, 1):
            _fail(folder / "full", failing_rank)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One start of two processes for all tests: starting them takes longer than what they do."""
    folder = tmp_path_factory.mktemp("two_processes")
    mp.spawn(_start, (folder,), nprocs=2)
    return folder


def _save(folder: Path, kind: str) -> None:
    model = wrap(make(0), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer)
    tensors, values = flatten(state_of(model, optimizer))
    mine = written_here(tensors)
    names: list[list[str]] = [[], []]
    dist.all_gather_object(names, list(mine))
    if kind == "ddp":  # what both hold alike is given once
        assert sorted(names[0] + names[1]) == sorted(tensors)
        held = sum(each.nbytes for each in mine.values())
        assert 0.3 < held / sum(each.nbytes for each in tensors.values()) < 0.7
    else:
        assert set(names[0]) | set(names[1]) == set(tensors) and set(names[0]) & set(names[1])
    save_training_state(folder / "step-000000003", {**mine, **values}, {"step": 3})


def _load(folder: Path, kind: str) -> None:
    found = latest_checkpoint(folder)
    assert found is not None and found.step == 3
    model = wrap(make(1), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    load_training_state(found.folder, state_of(model, optimizer), verify=False)
    save_training_state(folder / "step-000000004", state_of(model, optimizer), {"step": 4})


@pytest.mark.parametrize("writer", ["ddp", "fsdp2"])
def test_two_processes_and_one__same_state(saved, writer):
    expected = make(0)
    expected_optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01)
    steps(expected, expected_optimizer)
    folder = saved / writer
    files = sorted(path.name for path in (folder / "step-000000003").glob("rank-*"))
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors"]  # both have written a share

    for step in (3, 4):
        model = make(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        assert load_training_state(folder / f"step-00000000{step}", state_of(model, optimizer))["world_size"] == 2
        joined = safetensors_storage.read_tensors(folder / f"step-00000000{step}", "student.")
        for name, value in expected.state_dict().items():
            # Each process saw the same batch, so averaged gradients differ from one process's by rounding at most.
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
            assert torch.equal(joined[name], model.state_dict()[name])
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert optimizer.state[one]["step"] == 3
            torch.testing.assert_close(optimizer.state[one]["exp_avg"], expected_optimizer.state[other]["exp_avg"])
    first, second = (safetensors_storage.read_tensors(folder / f"step-00000000{step}") for step in (3, 4))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _fail(folder: Path, failing_rank: int) -> None:
    original = safetensors_storage.SafetensorsWriter._write

    def full(self, plan, planner):
        if dist.get_rank() == failing_rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
        return original(self, plan, planner)

    model = make(0)
    safetensors_storage.SafetensorsWriter._write = full
    with pytest.raises(OSError, match="No space left"):
        save_training_state(folder / "step-000000003", {"student": model}, {"step": 3})
    safetensors_storage.SafetensorsWriter._write = original
    with pytest.raises(CheckpointError, match="no complete training checkpoint"):
        load_training_state(folder / "absent", {"student": model})


def test_a_full_disk_of_one_process__all_raise_and_nothing_stays(saved):
    assert list((saved / "full").iterdir()) == []
