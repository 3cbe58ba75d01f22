"""Training checkpoints: exact, whole or absent, safe to open, the same for one process and many."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from meddino.checkpoints.state import safetensors_storage
from meddino.checkpoints.state.flat_state import OptimizerState
from meddino.checkpoints.state.names import checkpoint_name, list_checkpoints, prune_checkpoints
from meddino.checkpoints.state.training_state import load_training_state, save_training_state
from meddino.checkpoints.state.verify import latest_checkpoint, verify_checkpoint
from meddino.core.errors import CheckpointError, MedDINOError


def small_model(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {
        "student": model,
        "optimizer": OptimizerState("optimizer", optimizer, model),
        "progress": {"samples": 0, "best": None},
    }


def save(folder: Path, step: int = 1, seed: int = 0) -> Path:
    return save_training_state(folder / checkpoint_name(step), {"student": small_model(seed)}, {"step": step, "stage": "s"})


def test_save_load__training_goes_on_bit_for_bit(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 0, 5)
    state = full_state(model, optimizer)
    state["progress"]["samples"] = 40
    save_training_state(tmp_path / checkpoint_name(5), state, {"step": 5, "stage": "s", "config": {"a": [1, 2.5]}})
    train(model, optimizer, 5, 9)

    other = small_model(seed=1)
    other_optimizer = torch.optim.AdamW([{"params": [p]} for p in reversed(list(other.parameters()))], lr=0.01)
    fresh = full_state(other, other_optimizer)
    meta = load_training_state(tmp_path / checkpoint_name(5), fresh)
    assert meta["step"] == 5 and meta["config"] == {"a": [1, 2.5]} and meta["world_size"] == 1
    assert fresh["progress"] == {"samples": 40, "best": None}
    train(other, other_optimizer, 5, 9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_save_load__before_the_first_step_there_are_no_moments(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    folder = save_training_state(tmp_path / checkpoint_name(0), full_state(model, optimizer), {"step": 0})
    train(model, optimizer, 0, 1)
    load_training_state(folder, full_state(model, optimizer))
    assert not optimizer.state


@pytest.mark.parametrize("dtype", sorted(safetensors_storage.DTYPE_CODES, key=str))
def test_save_load__every_data_type_and_odd_shapes(tmp_path, dtype):
    def tensors(fill: int) -> dict:
        return {
            "scalar": torch.tensor(fill).to(dtype),
            "empty": torch.zeros(0, 3, dtype=dtype),
            "odd": torch.full((3, 5), fill).to(dtype),
            "strided": torch.full((4, 3), fill).to(dtype).t(),
        }

    saved = tensors(1)
    folder = save_training_state(tmp_path / checkpoint_name(1), {"t": saved}, {"step": 1})
    loaded = tensors(0)
    load_training_state(folder, {"t": loaded})
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_save__equal_states_give_equal_bytes(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == ["index.json", "meta.json", "rank-00000.safetensors"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_load__part_of_a_checkpoint_and_deeper_names(tmp_path):
    teacher = nn.ModuleDict({"backbone": small_model(1), "head": nn.Linear(3, 2)})
    folder = save_training_state(tmp_path / checkpoint_name(1), {"student": small_model(0), "teacher": teacher}, {"step": 1})
    gram_teacher = small_model(2)
    load_training_state(folder, {"teacher.backbone": gram_teacher})
    assert torch.equal(gram_teacher[0].weight, teacher["backbone"][0].weight)
    joined = safetensors_storage.read_tensors(folder, "teacher.backbone.")
    assert joined.keys() == gram_teacher.state_dict().keys()
    assert torch.equal(joined["2.weight"], teacher["backbone"][2].weight)


def test_load__another_model_is_named(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"different \(7\).*student.0.weight: \[6, 4\].*\[7, 4\]"):
        load_training_state(folder, {"student": small_model(width=7)})
    with pytest.raises(CheckpointError, match=r"in it but not wanted \(7\)"):
        load_training_state(folder, {"student": nn.ModuleDict({"0": nn.Linear(4, 6)})})
    with pytest.raises(CheckpointError, match=r"not in it \(9\).*teacher"):
        load_training_state(folder, {"teacher": small_model()})
    with pytest.raises(CheckpointError, match=r"float32 in the checkpoint.*float64 wanted"):
        load_training_state(folder, {"student": small_model().double()})


@pytest.mark.parametrize("file", ["meta.json", "index.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_latest__a_damaged_one_is_passed_over_loudly(tmp_path, caplog, file, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / file
    content = path.read_bytes()
    if damage == "flip":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:-20])
    else:
        path.unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.folder == good and found.step == 1
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["meddino.checkpoints.state.verify"]
    assert str(bad) in caplog.text
    with pytest.raises(CheckpointError):
        load_training_state(bad, {"student": small_model()})


def test_latest__nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-000000007").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_save__a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, plan, planner):
        (self.folder / "rank-00000.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_storage.SafetensorsWriter, "_write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_save__too_little_room_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MedDINOError, match="no room for checkpoint step-000000001"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save__wrong_input_is_named(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="integer 'step'"):
        save_training_state(tmp_path / "x", {"m": model}, {})
    with pytest.raises(ValueError, match="files"):
        save_training_state(tmp_path / "x", {"m": model}, {"step": 1, "files": 2})
    with pytest.raises(CheckpointError, match="OptimizerState"):
        save_training_state(tmp_path / "x", {"o": torch.optim.AdamW(model.parameters())}, {"step": 1})
    with pytest.raises(CheckpointError, match=r"'a.b' is a set"):
        save_training_state(tmp_path / "x", {"a": {"b": {1}}}, {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_prune__keeps_the_newest_the_multiples_and_the_named(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step)
    leftover = tmp_path / "step-000000009.123.partial"
    leftover.mkdir()
    deleted = prune_checkpoints(tmp_path, keep_last=2, keep_every=3, keep=[tmp_path / checkpoint_name(1)])
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (1, 3, 6, 7, 8)]
    assert len(deleted) == 3 and not leftover.exists()
    with pytest.raises(ValueError, match="keep_last"):
        prune_checkpoints(tmp_path, keep_last=0)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    folder = save(tmp_path)
    assert all(path.read_bytes()[:2] != b"\x80\x02" for path in folder.iterdir())

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    load_training_state(folder, {"student": small_model(3)})


def test_index__may_not_point_outside_the_folder(tmp_path):
    folder = save(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    next(iter(index["tensors"].values()))["pieces"][0]["file"] = "../../secret"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        safetensors_storage.read_tensors(folder)


def test_verify__version_of_another_program(tmp_path):
    folder = save(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99 is not readable"):
        verify_checkpoint(folder)
    (folder / "meta.json").write_text(json.dumps({**meta, "format": "other"}))
    with pytest.raises(CheckpointError, match="format is 'other'"):
        verify_checkpoint(folder)


def test_save__killed_while_writing_leaves_the_one_before(tmp_path):
    first = save(tmp_path, 1)
    code = f"""
import os, signal, torch
from pathlib import Path
from meddino.checkpoints.state import training_state, verify
verify.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # tensors are there, meta.json is not
training_state.save_training_state(Path({str(tmp_path)!r}) / "step-000000002", {{"w": torch.ones(3)}}, {{"step": 2}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the first one and a leftover
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.folder == first
    second = save(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [first, second]
