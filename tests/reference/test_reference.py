"""The comparer: on the recorded numbers, on records of our own with other sizes, and with planted errors."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.reference.__main__ import compare, main
from tests.reference.own_records import write_records
from tests.reference.records import published_config
from tests.reference.report import RecordsError


@pytest.fixture(scope="module")
def own_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, seed=7)
    return folder


def beyond(folder):
    return {item.name: item.difference for item in compare(folder) if not item.passed}


def copy_with(source, target, file, change):
    target.mkdir()
    for path in source.iterdir():
        tensors = load_file(path) if path.suffix == ".safetensors" else None
        if tensors is None:
            (target / path.name).write_text(path.read_text())
            continue
        if path.stem == file:
            change(tensors)
        save_file(tensors, target / path.name)
    return target


def test_compare__shared_reference(shared_reference):
    assert beyond(shared_reference) == {}


def test_main__prints_and_returns_0(shared_reference, capsys):
    assert main([str(shared_reference)]) == 0
    assert "0 beyond their tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [7, 8])
def test_compare__other_sizes_and_temperatures(tmp_path, seed):
    write_records(tmp_path, seed)
    items = compare(tmp_path)
    assert {item.name: item.difference for item in items if not item.passed} == {}
    names = {item.name for item in items}
    assert {"backbone_odd case1 masked patch_tokens", "gram loss_batch_level", "loss total", "parameter groups: names"} <= names


@pytest.mark.parametrize(
    ("file", "tensor", "size", "item"),
    [
        ("backbone_odd", "case0.block1", 1e-4, "backbone_odd case0 block 1"),
        ("losses", "dino.teacher_probabilities", 1e-4, "sinkhorn-knopp of dino"),
        ("losses", "koleo.loss", 1e-4, "koleo loss"),
        ("training_step", "loss.ibot_loss", 1e-2, "loss ibot_loss"),
        ("training_step", "grad.backbone.blocks.1.attn.qkv.weight", 1e-1, "gradient backbone.blocks.1.attn.qkv.weight"),
        ("training_step", "after.student.ibot_head.mlp.2.bias", 1e-4, "student after ibot_head.mlp.2.bias"),
        ("training_step", "after.teacher.dino_head.last_layer.weight", 1e-5, "teacher after dino_head.last_layer.weight"),
    ],
)
def test_compare__a_planted_error_is_found(own_records, tmp_path, file, tensor, size, item):
    def change(tensors):
        tensors[tensor].flatten()[0] += size

    found = set(beyond(copy_with(own_records, tmp_path / "changed", file, change)))
    # The cross-entropies are compared on the recorded assignments, so an error there shows in them too.
    assert found - {"dino loss_global", "dino loss_global_ignore_diagonal", "dino loss_local"} == {item}


def test_compare__nan_is_beyond(own_records, tmp_path):
    def change(tensors):
        tensors["case0.cls_token"][0, 0] = float("nan")

    assert set(beyond(copy_with(own_records, tmp_path / "changed", "backbone_odd", change))) == {"backbone_odd case0 cls_token"}


def test_compare__a_wrong_parameter_group_is_found(own_records, tmp_path):
    folder = copy_with(own_records, tmp_path / "changed", "", lambda _tensors: None)
    described = json.loads((folder / "records.json").read_text())
    described["parameter_groups"]["backbone.cls_token"]["lr_multiplier"] *= 1.01
    (folder / "records.json").write_text(json.dumps(described))
    assert set(beyond(folder)) == {"parameter groups: lr_multiplier"}


def test_main__beyond_returns_1(own_records, tmp_path, capsys):
    def change(tensors):
        tensors["koleo.loss"] += 1

    assert main([str(copy_with(own_records, tmp_path / "changed", "losses", change))]) == 1
    assert "1 beyond their tolerance" in capsys.readouterr().out


def test_main__nothing_to_compare_returns_2(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no readable records.json" in capsys.readouterr().err
    (tmp_path / "records.json").write_text('{"backbone_x": {"arguments": {}}}')
    assert main([str(tmp_path)]) == 2
    assert "backbone_x.safetensors is missing" in capsys.readouterr().err


def test_published_config__unknown_argument():
    with pytest.raises(RecordsError, match="'window' = 7 is unknown"):
        published_config({"window": 7})
