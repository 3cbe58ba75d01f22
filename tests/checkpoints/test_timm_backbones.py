"""A trained timm model: checkpoint, export, loading again, evaluation, and weights to begin from."""

import json

import jaxtyping
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import meddino
from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.state.names import checkpoint_name
from meddino.checkpoints.state.training_state import save_training_state
from meddino.checkpoints.weights.coverage import LoadingTolerances
from meddino.checkpoints.weights.load import load_backbone_weights
from meddino.core.errors import CheckpointError
from meddino.models.registry import backbone_config, backbone_from_config

RESNET = "timm:resnet10t"


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of a small ResNet whose statistics are no longer those it was built with."""
    return trained_resnet(tmp_path, RESNET)


def trained_resnet(tmp_path, name: str):
    torch.manual_seed(0)
    backbone = backbone_from_config(backbone_config(name)).train()
    backbone.tokens(torch.randn(4, 3, 32, 32))
    meta = {
        "step": 3,
        "stage": "toy",
        "backbone": {"name": name, **backbone.config.model_dump(mode="json")},
        "input_contract": {},
        "corpus_hash": "abc",
        "lineage": {"stages": [{"stage": "toy", "steps": 3}], "parent": None, "resolutions_px_seen": [32]},
    }
    state = {"teacher": torch.nn.ModuleDict({"backbone": backbone})}
    folder = tmp_path / "run" / "toy" / "checkpoints" / checkpoint_name(3)
    return save_training_state(folder, state, meta), backbone.eval()


def test_export__loads_again_and_computes_the_same(trained, tmp_path):
    checkpoint, backbone = trained
    model = meddino.load(export_model(checkpoint, tmp_path / "model", ["safetensors", "timm"]))
    images = torch.randn(2, 3, 48, 80)
    assert torch.equal(model.forward_features(images).patch_tokens, backbone.tokens(images).patch_tokens)
    assert [tuple(one.shape[1:]) for one in model.get_intermediate_layers(images, (0, 1, 3, 4), reshape=True)] == [
        tuple(one.shape[1:]) for one in backbone.get_intermediate_layers(images, (0, 1, 3, 4))
    ]
    theirs = timm.create_model("resnet10t", checkpoint_path=str(tmp_path / "model/timm/model.safetensors"), num_classes=0)
    assert torch.equal(theirs.eval().forward_features(images), model.forward_features(images).patch_map)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architecture"]["timm"] == "resnet10t" and config["weights"]["parameters"] == sum(
        value.numel() for value in backbone.parameters()
    )
    assert "timm's resnet10t" in (tmp_path / "model/MODEL_CARD.md").read_text()


def test_export__onnx_is_proven_equal(trained, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # while a network is traced, sides are symbols
    checkpoint, backbone = trained
    export_model(checkpoint, tmp_path / "model", ["onnx"])
    session = onnxruntime.InferenceSession(tmp_path / "model/onnx/model.onnx")
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 96)).astype(np.float32)
    (found,) = session.run(["cls_token"], {"images": images})
    np.testing.assert_allclose(found, backbone.tokens(torch.from_numpy(images)).cls_token.detach(), atol=1e-4)


@pytest.mark.slow
def test_export__of_a_resnet50_is_the_same_in_safetensors_timm_and_onnx(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    checkpoint, backbone = trained_resnet(tmp_path, "timm:resnet50")
    out = export_model(checkpoint, tmp_path / "model", ["safetensors", "timm", "onnx"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = backbone.tokens(images)
        assert torch.equal(meddino.load(out).forward_features(images).patch_tokens, expected.patch_tokens)
        theirs = timm.create_model("resnet50", checkpoint_path=str(out / "timm/model.safetensors"), num_classes=0).eval()
        assert torch.equal(theirs.forward_features(images), expected.patch_map)
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx")
    (found,) = session.run(["cls_token"], {"images": images.numpy()})
    np.testing.assert_allclose(found, expected.cls_token, atol=1e-4)


def test_export__transformers_has_no_such_model(trained, tmp_path):
    with pytest.raises(CheckpointError, match="transformers has no timm:resnet10t"):
        export_model(trained[0], tmp_path / "model", ["hf"])
    assert not (tmp_path / "model").exists()


def test_weights__from_a_checkpoint_and_from_a_file_of_timm(trained, tmp_path):
    checkpoint, backbone = trained
    fresh = backbone_from_config(backbone_config(RESNET))
    load_backbone_weights(checkpoint, fresh.config).load_into(fresh)
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in fresh.state_dict().items())
    with_classifier = timm.create_model("resnet10t", num_classes=7)
    save_file(with_classifier.state_dict(), tmp_path / "timm.safetensors")
    weights = load_backbone_weights(f"{RESNET}@{tmp_path / 'timm.safetensors'}", fresh.config)
    weights.load_into(fresh)
    assert torch.equal(fresh.model.conv1[0].weight, with_classifier.conv1[0].weight)
    assert sorted(weights.coverage.left_out) == ["model.fc.bias [7]", "model.fc.weight [7, 512]"]


def test_weights__a_missing_tensor_is_refused_or_allowed_by_name(trained, tmp_path):
    config = backbone_config(RESNET)
    tensors = timm.create_model("resnet10t", num_classes=0).state_dict()
    save_file({key: value for key, value in tensors.items() if key != "layer4.0.conv1.weight"}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 1: model\.layer4\.0\.conv1\.weight"):
        load_backbone_weights(tmp_path / "w.safetensors", config)
    weights = load_backbone_weights(tmp_path / "w.safetensors", config, LoadingTolerances(missing=("model.layer4.0.conv1.*",)))
    assert weights.coverage.fresh == ["model.layer4.0.conv1.weight"]
    assert load_file(tmp_path / "w.safetensors").keys() <= tensors.keys()


def test_random__is_a_function_of_the_seed():
    one, same, other = (meddino.load(f"random:{RESNET}", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.backbone.model.conv1[0].weight, same.backbone.model.conv1[0].weight)
    assert not torch.equal(one.backbone.model.conv1[0].weight, other.backbone.model.conv1[0].weight)


def test_evaluation__takes_the_export_with_its_contract(trained, tmp_path):
    from meddino_evaluation.backbones.load import load_backbone

    checkpoint, backbone = trained
    export_model(checkpoint, tmp_path / "model")
    adapter = load_backbone(str(tmp_path / "model"))
    assert adapter.contract.own is not None and adapter.embed_dim == 512
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapter.tokens(images).cls, backbone.tokens(images).cls_token)
