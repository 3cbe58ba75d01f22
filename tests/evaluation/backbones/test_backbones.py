import numpy as np
import pytest
import torch
from meddino_evaluation.backbones.adapter import Backbone, state_hash, timm_contract
from meddino_evaluation.backbones.catalogue import CATALOGUE
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.backbones.transformers_network import TransformersNetwork, build_transformers
from meddino_evaluation.backbones.weights_files import load_weights
from meddino_evaluation.cli import main
from safetensors.torch import save_file

from meddino.core.errors import CheckpointError, ConfigError
from meddino.data.intensity import CTIntensity
from meddino.data.model_input import normalise
from meddino.models.timm_backbone import TimmBackbone, build_timm, timm_config
from meddino.models.vision_transformer import VisionTransformer

TINY_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
TINY = {
    "dinov2_vits14": ({**TINY_VIT, "img_size": 56}, 56),
    "dinov3_vits16": (TINY_VIT, 64),
    "clip_vitl14": ({**TINY_VIT, "img_size": 56}, 56),
    "mae_vitl16": ({**TINY_VIT, "img_size": 64}, 32),
    "sam_vitl16": ({**TINY_VIT, "img_size": 64, "global_attn_indexes": (2,)}, 64),
    "resnet50": ({"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}, 64),
    "densenet121": ({"block_config": (1, 1, 1, 1), "growth_rate": 8}, 64),
    "vgg16": ({"mlp_ratio": 0.01}, 32),
}


def timms(name: str, arguments: dict) -> Backbone:
    network = TimmBackbone(timm_config(CATALOGUE[name].architecture, **arguments))
    return Backbone(name, network, timm_contract(network))


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_catalogue__every_entry_is_built_and_described(name):
    entry = CATALOGUE[name]
    # Architecture without memory: the giant has 1.1 billion parameters.
    with torch.device("cpu" if entry.library == "meddino" else "meta"):
        if entry.library == "timm":
            backbone = timms(name, entry.arguments)
        elif entry.library == "meddino":
            backbone = load_backbone(f"random:{name}")
        else:
            pytest.importorskip("transformers")
            network = TransformersNetwork(name, build_transformers(entry.architecture, entry.arguments))
            backbone = Backbone(name, network, network.contract)
    assert backbone.embed_dim > 0
    assert backbone.contract.channels == 3
    assert len(backbone.stages()) >= 4
    assert entry.source.startswith("https://")
    assert entry.licence


@pytest.mark.parametrize("name", sorted(TINY))
def test_timm_backbone__tokens_and_maps(name):
    arguments, size = TINY[name]
    backbone = timms(name, arguments).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens = backbone.tokens(images, count=3)
        assert tokens.cls.shape == (2, tokens.patches.shape[1])
        assert tokens.cls.shape[1] == backbone(images).shape[1]
        torch.testing.assert_close(tokens.cls, backbone(images))
        assert 1 <= len(tokens.blocks) <= 3
        maps = backbone.patch_maps(images, 3)
        features = backbone.network.model.forward_features(images)
    assert len(maps) == 3
    if features.ndim == 4:
        torch.testing.assert_close(tokens.cls, features.mean((2, 3)))
    else:
        torch.testing.assert_close(tokens.cls, features[:, 0])


def test_transformers_backbone__tokens():
    pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    network = TransformersNetwork("msn", build_transformers("ViTMSNModel", {**small, "patch_size": 8}))
    backbone = Backbone("msn", network, network.contract).eval()
    images = torch.randn(2, 3, 48, 48)  # another size than the position embedding's
    with torch.no_grad():
        tokens = backbone.tokens(images, count=2)
        reference = network.model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(tokens.cls, reference[:, 0])
    assert tokens.patches.shape == (2, 32, 6, 6)
    assert len(tokens.blocks) == 2
    assert [tuple(one.shape) for one in backbone.patch_maps(images, 2)] == [(2, 32, 6, 6)] * 2


def test_meddino_backbone__tokens_equal_the_model():
    backbone = load_backbone("random:vitnano8", seed=3)
    assert isinstance(backbone.network, VisionTransformer)
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.tokens(images, count=4)
    output = backbone.network(images)
    torch.testing.assert_close(tokens.cls, output.cls_token)
    assert [tuple(cls.shape) for cls in tokens.blocks] == [(2, 128)] * 4
    torch.testing.assert_close(tokens.patches.flatten(2).transpose(1, 2), output.patch_tokens)
    assert backbone.hash() == load_backbone("random:vitnano8", seed=3).hash()
    assert backbone.hash() != load_backbone("random:vitnano8", seed=4).hash()
    assert load_backbone("random:vitnano8@3", seed=4).hash() == backbone.hash()  # the seed in the name goes before
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_load_backbone__missing_weights_say_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDDINO_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        load_backbone("dinov2_vits14")
    message = str(error.value)
    assert str(tmp_path / "dinov2_vits14.safetensors") in message
    assert "nothing is downloaded" in message
    assert "Apache-2.0" in message


def test_weights_command__lists_and_checks(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEDDINO_WEIGHTS", str(tmp_path))
    model = build_timm("resnet50", TINY["resnet50"][0])
    save_file(model.state_dict(), tmp_path / "resnet50.safetensors")
    assert main(["weights"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed and entry.source in listed and entry.licence in listed for name, entry in CATALOGUE.items())
    assert "here: resnet50.safetensors" in listed
    assert main(["weights", "random:vitnano8"]) == 0
    assert "0.8 million parameters, width 128" in capsys.readouterr().out
    assert main(["weights", "resnet50"]) == 2  # a network of another size
    assert "does not fit" in capsys.readouterr().err
    assert main(["weights", "vitb16"]) == 2
    error = capsys.readouterr().err
    assert "'vitb16' is an architecture: random:vitb16" in error
    assert "did you mean" not in error
    assert "docs/weights.md" in error


def test_load_backbone__unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'dinov2_vits14'"):
        load_backbone("dinov2_vits41")
    with pytest.raises(ConfigError, match="timm has no model"):
        load_backbone("random:timm:nosuchmodel")


def test_load_backbone__weights_from_a_file(tmp_path):
    first = load_backbone("random:timm:resnet10t", seed=1)
    save_file(first.network.model.state_dict() | {"fc.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    torch.save({"state_dict": first.network.model.state_dict()}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        again = load_backbone(f"timm:resnet10t@{tmp_path / file}", seed=2)
        assert state_hash(again) == state_hash(first)


def test_load_backbone__a_file_that_does_not_fit_is_refused(tmp_path):
    tensors = load_backbone("random:timm:resnet10t").network.model.state_dict()
    few = {name: value for name, value in tensors.items() if not name.startswith("layer4")}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors are missing.*layer4"):
        load_backbone(f"timm:resnet10t@{tmp_path / 'few.safetensors'}")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no readable weights file"):
        load_backbone(f"timm:resnet10t@{tmp_path / 'bad.safetensors'}")


class _Hostile:
    def __reduce__(self):
        return (print, ("run!",))


def test_load_backbone__a_pickle_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": _Hostile()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        load_backbone(f"timm:resnet10t@{tmp_path / 'evil.pth'}")
    assert "run!" not in capsys.readouterr().out


def test_load_weights__sam_names_with_and_without_prefix():
    model = build_timm("samvit_base_patch16", {**TINY_VIT, "img_size": 64, "global_attn_indexes": (2,)})
    official = {name.replace(".mlp.fc", ".mlp.lin"): value for name, value in model.state_dict().items()}
    with_prefix = {f"image_encoder.{name}": value for name, value in official.items()} | {"mask_decoder.x": torch.zeros(1)}
    for tensors in (official, with_prefix):
        other = build_timm("samvit_base_patch16", {**TINY_VIT, "img_size": 64, "global_attn_indexes": (2,)})
        load_weights(other, tensors, CATALOGUE["lvmmed_vitb16"].prefixes, "file")
        assert state_hash(other) == state_hash(model)


def test_contract__hounsfield_units_for_either_kind():
    hu = torch.tensor([-3000.0, -1000.0, 0.0, 1000.0, 3000.0]).view(1, 1, 1, 5)
    ours = ImageContract((), (), 16, 224, CTIntensity())
    torch.testing.assert_close(ours.from_ct(hu)[0], normalise(hu[0, 0], CTIntensity()))
    photo = ImageContract(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(photo.from_ct(hu)[0, :, 0].numpy(), np.tile([-1, -1, 0, 1, 1], (3, 1)), atol=1e-6)
    narrow = photo.from_ct(hu, window=(-160.0, 240.0))
    assert narrow[0, 0, 0, 2].item() == pytest.approx(2 * 0.4 - 1)
    torch.testing.assert_close(ours.from_unit(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), (1000 - 65.108) / 178.017))


def test_contract__size_that_does_not_fit():
    with pytest.raises(ConfigError, match="use 224 or 238"):
        ImageContract(multiple_px=14).check_size(230, "dinov2_vits14")
