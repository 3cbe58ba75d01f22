"""meddino.load: damaged or foreign folders are named with what to do; random weights for comparison."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import meddino
from meddino.checkpoints.export.model_folder import FileRecord, read_record, write_weights
from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.weights.find_weights import find_weights
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import sha256_file
from meddino.data.intensity import CTIntensity
from meddino.models.vision_transformer import ViTConfig


@pytest.fixture
def model_folder(make_checkpoint, tmp_path):
    return export_model(make_checkpoint(), tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write_weights(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["weights"]["sha256"] = sha256_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_load__random_of_the_same_architecture_and_contract(model_folder):
    model, trained = meddino.load(f"random:{model_folder}", seed=3), meddino.load(model_folder)
    assert model.config.architecture == trained.config.architecture
    assert model.contract == trained.contract and model.lineage.stages == ()
    assert not torch.equal(model.backbone.patch_embed.proj.weight, trained.backbone.patch_embed.proj.weight)
    assert torch.equal(model.backbone.cls_token, meddino.load(f"random:{model_folder}", seed=3).backbone.cls_token)
    with pytest.raises(ConfigError, match="unknown backbone 'vitb61'; did you mean 'vitb16'"):
        meddino.load("random:vitb61")


def test_load__random_of_a_checkpoints_architecture(make_checkpoint):
    checkpoint = make_checkpoint()
    model, trained = meddino.load(f"random:{checkpoint}", seed=3), meddino.load(checkpoint)
    assert model.config.architecture == trained.config.architecture and model.contract == trained.contract
    assert not torch.equal(model.backbone.patch_embed.proj.weight, trained.backbone.patch_embed.proj.weight)


def test_load__nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights at.*nothing is downloaded"):
        meddino.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is empty"):
        meddino.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "no JSON"),
        ("[]", "not of a MedDINO model"),
        ('{"format": "other"}', "not of a MedDINO model"),
        ('{"format": "meddino-model", "version": 2}', "reads 1: update meddino"),
        ('{"format": "meddino-model", "version": 1, "extra": 1}', "unknown key 'extra'"),
    ],
)
def test_load__config_of_another_kind(model_folder, content, message):
    (model_folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        meddino.load(model_folder)


def test_load__weights_damaged_or_missing(model_folder):
    path = model_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"SHA-256.*copy the model folder again"):
        meddino.load(model_folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        meddino.load(model_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config["input_contract"].update(hu_min=-800.0),
            "input_contract.hu_min -800.0, its weights were written with -900.0",
        ),
        (lambda config: config["lineage"].update(licence="MIT"), "licence MIT, its weights were written with"),
    ],
)
def test_load__a_config_that_was_changed_by_hand(model_folder, change, message):
    config = json.loads((model_folder / "config.json").read_text())
    change(config)
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        meddino.load(model_folder)


def test_load__weights_of_another_architecture(model_folder):
    def change(tensors):
        tensors["norm.extra"] = torch.zeros(1)
        tensors["cls_token"] = torch.zeros(1, 1, 5)
        del tensors["mask_token"]

    rewrite(model_folder, change)
    with pytest.raises(CheckpointError) as caught:
        meddino.load(model_folder)
    for text in ("missing (1): mask_token", "unexpected (1): norm.extra", "cls_token [1, 1, 5] instead of [1, 1, 32]"):
        assert text in str(caught.value)


def test_load__weights_not_finite(model_folder):
    rewrite(model_folder, lambda tensors: tensors["norm.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"not finite \(1\): norm.bias"):
        meddino.load(model_folder)


def test_load__bf16_rope_periods_fit(model_folder):
    # The official trainer keeps them in bf16; a model reads them into the data type it computes with.
    def change(tensors):
        tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()

    rewrite(model_folder, change)
    assert meddino.load(model_folder).backbone.rope_embed.periods.dtype == torch.float32


def test_load__a_copied_file_knows_its_contract_and_architecture(model_folder, tmp_path):
    folder = meddino.load(model_folder)
    changed = {"hu_min": -160.0, "hu_max": 240.0}
    contract = CTIntensity(**folder.contract.model_dump() | changed)
    shape = folder.config.architecture.model_copy(update={"norm_eps": 3e-4})
    said = FileRecord(architecture=shape, input_contract=contract, role="teacher", licence="CC-BY-4.0")
    tensors = load_file(model_folder / "model.safetensors")
    (tmp_path / "alone").mkdir()
    for path in (tmp_path / "copied.bin", tmp_path / "alone/model.safetensors"):
        write_weights(path, tensors, said)
        loaded = meddino.load(path if path.suffix == ".bin" else path.parent)
        assert (loaded.contract, loaded.config.architecture, loaded.lineage.licence) == (contract, shape, "CC-BY-4.0")
        assert all(torch.equal(value, tensors[name]) for name, value in loaded.backbone.state_dict().items())
        assert loaded.config.weights.sha256 == sha256_file(path)
        assert find_weights(path).config == ViTConfig(**shape.model_dump(exclude={"name"}))
    exported = meddino.load(model_folder / "model.safetensors")
    assert (exported.contract, exported.config.architecture) == (folder.contract, folder.config.architecture)
    assert exported.config.weights.sha256 == folder.config.weights.sha256


def test_write_weights__a_record_changes_the_metadata_only(model_folder, tmp_path):
    from safetensors import safe_open

    tensors = load_file(model_folder / "model.safetensors")
    write_weights(tmp_path / "plain", tensors)
    config = meddino.load(model_folder).config
    said = FileRecord(architecture=config.architecture, input_contract=config.input_contract, role="teacher", licence="x")
    for name in ("one", "two"):
        write_weights(tmp_path / name, tensors, said)
    one, plain = (tmp_path / "one").read_bytes(), (tmp_path / "plain").read_bytes()
    assert one == (tmp_path / "two").read_bytes()
    sizes = [int.from_bytes(content[:8], "little") for content in (one, plain)]
    assert one[8 + sizes[0] :] == plain[8 + sizes[1] :]
    assert (8 + sizes[0]) % 8 == 0
    assert read_record(tmp_path / "one") == said
    assert read_record(tmp_path / "plain") is None
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_export__honours_the_umask(make_checkpoint, tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = export_model(make_checkpoint(), tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
