"""meddino-export: what is written computes what the source does, says where it comes from, and is whole or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file

import meddino
from meddino.checkpoints.cli import main
from meddino.checkpoints.export import write as export
from meddino.checkpoints.export.comparison import check_sizes, check_slices
from meddino.checkpoints.export.model import random_model
from meddino.checkpoints.export.write import export_model, largest_difference
from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.core.errors import CheckpointError, MedDINOError
from meddino.models.vision_transformer import VisionTransformer

FILES = ["MODEL_CARD.md", "config.json", "model.safetensors"]


def test_export__the_teachers_backbone_comes_back_exactly(make_checkpoint, small_config, tmp_path):
    checkpoint = make_checkpoint()
    out = export_model(checkpoint, tmp_path / "model")
    assert sorted(path.name for path in out.iterdir()) == FILES
    teacher = VisionTransformer(small_config)
    teacher.load_state_dict(read_tensors(checkpoint, "teacher.backbone."))
    model = meddino.load(out)
    hu = 500 * torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    images = ((hu.clamp(-900, 1000) - 65.108) / 178.017)[:, None].repeat(1, 3, 1, 1)
    assert torch.equal(model.preprocess(hu), images)
    with torch.no_grad():
        expected = teacher.eval()(images)
        assert torch.equal(model.forward_features(images).cls_token, expected.cls_token)
        assert torch.equal(model(images).patch_tokens, expected.patch_tokens)
        maps = model.get_intermediate_layers(images, [1, 3], reshape=True, norm=False)
        assert torch.equal(maps[1], teacher.get_intermediate_layers(images, [3], norm=False)[0])
    assert len(model.get_intermediate_layers(images, 4)) == 4
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.patch_size, model.embed_dim, model.depth) == (8, 32, 4)


def test_export__config_and_card_say_where_it_comes_from(make_checkpoint, tmp_path):
    (tmp_path / "figures.json").write_text('{"dice": 0.5}')
    assert main([str(make_checkpoint()), "--out", str(tmp_path / "m"), "--metrics", str(tmp_path / "figures.json")]) == 0
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["format"] == "meddino-model" and config["version"] == 1
    assert config["architecture"]["name"] == "small" and config["architecture"]["embed_dim"] == 32
    assert config["input_contract"]["hu_min"] == -900 and config["resolutions_px_seen"] == [64, 96]
    assert config["lineage"]["corpus_hash"] == "abc123" and config["lineage"]["licence"] == "DINOv3 License"
    assert config["metrics"] == {"dice": 0.5} and config["weights"]["role"] == "teacher"
    card = (tmp_path / "m/MODEL_CARD.md").read_text()
    for text in ("license_name: DINOv3 License", "[-900, 1000]", "stage1_pretrain: 5 steps", "abc123", "phantom", "dice: 0.5"):
        assert text in card, text
    everything = card + json.dumps(config)
    assert str(tmp_path) not in everything
    assert meddino.load(tmp_path / "m").lineage.stages[0].steps == 5


def test_export__a_run_gives_its_last_finished_stage(make_checkpoint, tmp_path):
    make_checkpoint("b_first", seed=1)
    make_checkpoint("b_first", "a_second", seed=2, planned=9)
    make_checkpoint("b_first", "a_second", seed=3, step=9, planned=9)
    unfinished = make_checkpoint("b_first", "a_second", "c_third", seed=4, planned=6)
    run = tmp_path / "run"
    expected = read_tensors(run / "a_second/checkpoints/step-000000009", "teacher.backbone.")
    found = load_file(export_model(run, tmp_path / "m") / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    by_stage = load_file(export_model(run, tmp_path / "n", stage="c_third") / "model.safetensors")
    assert torch.equal(by_stage["cls_token"], read_tensors(unfinished, "teacher.backbone.")["cls_token"])
    by_folder = load_file(export_model(unfinished.parent, tmp_path / "o", role="student") / "model.safetensors")
    assert torch.equal(by_folder["cls_token"], read_tensors(unfinished, "student.backbone.")["cls_token"])
    assert [(stage.name, stage.steps) for stage in meddino.load(tmp_path / "n").lineage.stages] == [
        ("b_first", 5),
        ("a_second", 5),
        ("c_third", 5),
    ]
    with pytest.raises(CheckpointError, match=r"no checkpoint of stage 'x'; .*a_second, b_first, c_third"):
        export_model(run, tmp_path / "p", stage="x")


def test_export__only_unfinished_stages(make_checkpoint, tmp_path):
    make_checkpoint(planned=6)
    with pytest.raises(CheckpointError, match=r"no finished stage yet.*--stage"):
        export_model(tmp_path / "run", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_export__equal_sources_give_equal_bytes(make_checkpoint, tmp_path):
    first = export_model(make_checkpoint(run="one"), tmp_path / "a")
    second = export_model(make_checkpoint(run="two").parents[2], tmp_path / "b")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)
    again = export_model(first, tmp_path / "c")  # an export of an export
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_export__half_precision(make_checkpoint, tmp_path, dtype):
    checkpoint = make_checkpoint()
    half, full = export_model(checkpoint, tmp_path / "h", dtype=dtype), export_model(checkpoint, tmp_path / "f")
    tensors = load_file(half / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "periods" not in name} == {export.DTYPES[dtype]}
    assert tensors["rope_embed.periods"].dtype == torch.float32
    one, other = meddino.load(half), meddino.load(full)
    assert one.config.weights.dtype == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    hu = check_slices(8)[0]
    assert 0 < largest_difference(export.outputs(one, hu), export.outputs(other, hu)) < 0.5


def test_export__fp16_overflow_is_named(make_checkpoint, tmp_path, monkeypatch):
    original = export.read_source

    def large(*arguments):
        source = original(*arguments)
        source.tensors["blocks.1.mlp.fc1.weight"][0, 0] = 7e4
        return source

    monkeypatch.setattr(export, "read_source", large)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc1.weight does not fit into fp16 .*70000.*bf16 or fp32"):
        export_model(make_checkpoint(), tmp_path / "m", dtype="fp16")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_export__nan_weights_are_no_matter_of_the_dtype(make_checkpoint, tmp_path, monkeypatch, dtype):
    original = export.read_source

    def broken(*arguments):
        source = original(*arguments)
        source.tensors["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
        return source

    monkeypatch.setattr(export, "read_source", broken)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc1.weight holds NaN .*earlier checkpoint") as caught:
        export_model(make_checkpoint(), tmp_path / "m", dtype=dtype)
    assert "--dtype" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_export__heads(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    out = export_model(checkpoint, tmp_path / "m", heads=True)
    heads = load_file(out / "heads.safetensors")
    assert torch.equal(
        heads["ibot_head.last_layer.weight"], read_tensors(checkpoint, "teacher.")["ibot_head.last_layer.weight"]
    )
    with pytest.raises(CheckpointError, match="holds no heads"):
        export_model(out, tmp_path / "n", heads=True)


def test_export__a_tampered_tensor_fails_and_leaves_what_was_there(make_checkpoint, tmp_path, monkeypatch, capsys):
    checkpoint = make_checkpoint()
    export_model(checkpoint, tmp_path / "model")
    before = {name: (tmp_path / "model" / name).read_bytes() for name in FILES}
    original = export.write_weights

    def tampered(path, tensors, record):
        original(path, {**tensors, "norm.weight": tensors["norm.weight"] * 1.0001}, record)

    monkeypatch.setattr(export, "write_weights", tampered)
    assert main([str(checkpoint), "--out", str(tmp_path / "model")]) == 2
    assert "does not compute what its source does" in capsys.readouterr().err
    assert before == {name: (tmp_path / "model" / name).read_bytes() for name in FILES}
    assert main([str(checkpoint), "--out", str(tmp_path / "other")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_export__wrong_input_is_one_line_and_exit_2(make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = [
        ([str(tmp_path / "absent"), "--out", "m"], "is no folder"),
        ([str(tmp_path / "empty"), "--out", "m"], "holds neither"),
        ([str(checkpoint), "--out", str(tmp_path / "mine")], "will not be replaced"),
        ([str(checkpoint), "--out", str(tmp_path / "mine/thesis.txt")], "is a file"),
        ([str(checkpoint), "--out", str(tmp_path / "m"), "--to", "pickle"], "unknown export formats"),
        ([str(checkpoint), "--out", str(tmp_path / "m"), "--metrics", str(tmp_path / "mine/thesis.txt")], "no readable JSON"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "m").exists() and (tmp_path / "mine/thesis.txt").exists()


def test_export__replaces_an_export_of_ours_alone(make_checkpoint, tmp_path, caplog):
    checkpoint, ours, theirs = make_checkpoint(), tmp_path / "ours", tmp_path / "theirs"
    export_model(checkpoint, ours, heads=True)
    export_model(checkpoint, ours)
    assert "heads.safetensors of the export before is not written again" in caplog.text
    (ours / "notes.txt").write_text("mine")
    theirs.mkdir()
    for name in ("model.safetensors", "config.json"):  # a folder as transformers writes it
        (theirs / name).write_text("{}")
    for folder, name in ((ours, "notes.txt"), (theirs, "config.json")):
        before = sorted(folder.iterdir())
        with pytest.raises(CheckpointError, match=rf"\({name}\) and will not be replaced"):
            export_model(checkpoint, folder)
        assert sorted(folder.iterdir()) == before


def test_export__no_room(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1})())
    with pytest.raises(MedDINOError, match="no room for the export"):
        export_model(checkpoint, tmp_path / "m")


def test_check_slices__two_sizes_one_not_square():
    slices = check_slices(16)
    assert [tuple(hu.shape) for hu in slices] == [(2, 128, 128), (2, 96, 160)]
    assert check_sizes(14)[1] == (84, 140)
    for hu in slices:
        assert hu.min() < -950 and hu.max() > 350
        assert torch.equal(hu, hu.round()) and not torch.equal(hu[0], hu[1])


def test_largest_difference__nan_is_infinite():
    assert largest_difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]) == 0.5
    assert largest_difference([torch.tensor([1.0])], [torch.tensor([float("nan")])]) == float("inf")
    with pytest.raises(CheckpointError, match="different shapes"):
        largest_difference([torch.zeros(2)], [torch.zeros(3)])


def test_random_model__seeded_and_apart_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = random_model("vitnano8", 1), random_model("vitnano8", 1), random_model("vitnano8", 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.backbone.cls_token, other.backbone.cls_token)
    assert not torch.equal(one.backbone.cls_token, third.backbone.cls_token)
    assert one.config.weights.sha256 == other.config.weights.sha256 != third.config.weights.sha256
