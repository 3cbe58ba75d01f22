"""Files from strangers: each kind of bad file is named with what to do, and nothing in it is run."""

import argparse
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from meddino.checkpoints.weights.weight_files import read_sharded_folder, read_weights_file
from meddino.core.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def equal(found, expected=TENSORS):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_read__formats_are_told_by_content(tmp_path):
    save_file(TENSORS, tmp_path / "safetensors.pth")
    torch.save(TENSORS, tmp_path / "zip.safetensors")
    torch.save(TENSORS, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    for name in ("safetensors.pth", "zip.safetensors", "legacy"):
        assert equal(read_weights_file(tmp_path / name).tensors), name


@pytest.mark.parametrize("new_format", [True, False])
def test_read__a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, new_format):
    marker = tmp_path / "executed"
    torch.save({"teacher": TENSORS, "x": Hostile(marker)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"would call posix\.system when opened; refused"):
        read_weights_file(tmp_path / "evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(CheckpointError):
        read_weights_file(tmp_path / "bare.pth")
    assert not marker.exists()


def test_read__harmless_objects_are_named_too(tmp_path):
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*save its tensors alone as safetensors"):
        read_weights_file(tmp_path / "args.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML or XML page .* accept the licence"),
        (b"  <html><body>404</body>", "HTML or XML page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "HTML or XML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 343000000\n",
            r"git-lfs pointer.*343,000,000.*git lfs pull",
        ),
        (b'{"error": "not found"}', "is JSON"),
        (b"\x1f\x8b\x08compressed", "neither safetensors nor a torch file"),
        (struct.pack("<Q", 1 << 40) + b'{"a"', "claims 1099511627776 bytes"),
        (struct.pack("<Q", 100) + b'{"a": 1}', "truncated"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "header is damaged"),
        (b"PK\x03\x04 and nothing more", "truncated: a torch file without its end"),
        (b"\x80\x02garbage", "damaged"),
    ],
)
def test_read__bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_read__truncated(tmp_path, keep):
    large = {"w": torch.randn(100, 100)}
    torch.save(large, tmp_path / "new.pth")
    torch.save(large, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(large, tmp_path / "file.safetensors")
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(CheckpointError, match="truncated"):
            read_weights_file(path)


def test_read__no_file_and_no_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="no weights file"):
        read_weights_file(tmp_path / "absent")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_weights_file(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="but list"):
        read_weights_file(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointError, match="zip archive but no torch file"):
        read_weights_file(tmp_path / "archive.pth")


def test_read__a_zip_bomb_and_a_stretched_tensor_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
        archive.writestr("bomb/data/0", bytes(1 << 20))
    with pytest.raises(CheckpointError, match="claims to unpack"):
        read_weights_file(tmp_path / "bomb.pth")
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "stretched.pth")
    with pytest.raises(CheckpointError, match="over fewer stored numbers"):
        read_weights_file(tmp_path / "stretched.pth")


def test_read__sections_and_wrappers_are_opened_and_noted(tmp_path):
    torch.save({"teacher": TENSORS, "student": {"s": torch.zeros(1)}, "epoch": 4}, tmp_path / "trainer.pth")
    file = read_weights_file(tmp_path / "trainer.pth")
    assert equal(file.tensors) and file.notes == ["section 'teacher'"]
    assert read_weights_file(tmp_path / "trainer.pth", "student").tensors.keys() == {"s"}
    with pytest.raises(CheckpointError, match="no section 'ema'; it has: teacher, student, epoch"):
        read_weights_file(tmp_path / "trainer.pth", "ema")

    wrapped = {f"module._orig_mod.{name}": value for name, value in TENSORS.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pth")
    file = read_weights_file(tmp_path / "wrapped.pth")
    assert equal(file.tensors)
    assert file.notes == ["section 'state_dict'", "prefix 'module.' taken off 2 names", "prefix '_orig_mod.' taken off 2 names"]

    torch.save({"blocks._checkpoint_wrapped_module.w": TENSORS["a.bias"]}, tmp_path / "inner.pth")
    assert read_weights_file(tmp_path / "inner.pth").tensors.keys() == {"blocks.w"}


def test_sharded__joined_and_missing_shards_named(tmp_path):
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"a.bias": TENSORS["a.bias"]}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"}}))
    assert equal(read_sharded_folder(tmp_path).tensors)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights file at .*model-2"):
        read_sharded_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_sharded_folder(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        read_sharded_folder(tmp_path)
