"""Exports for timm, transformers and onnxruntime: loaded as a user would, computing the same; tampered ones fail."""

import json
import stat

import jaxtyping
import pytest
import torch

import meddino
from meddino.checkpoints.cli import main
from meddino.checkpoints.export import to_onnx as export_onnx
from meddino.checkpoints.export import to_timm as export_timm
from meddino.checkpoints.export import to_transformers as export_transformers
from meddino.checkpoints.export.comparison import all_tokens, check_sizes
from meddino.checkpoints.export.foreign_options import ForeignOptions
from meddino.checkpoints.export.model import Model, random_model
from meddino.checkpoints.export.to_timm import timm_model
from meddino.checkpoints.export.to_transformers import transformers_config
from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.weights.infer_architecture import architecture_from_transformers
from meddino.core.errors import CheckpointError
from meddino.models.backbone import Backbone
from meddino.models.registry import BACKBONES
from meddino.models.vision_transformer import ViTConfig

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
FLAT = ViTConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, norm_eps=1e-5)
GATED = ViTConfig(embed_dim=48, depth=2, num_heads=3, patch_size=16, ffn_layer="swiglu", ffn_ratio=6.0, qkv_bias=False)


@pytest.fixture
def traceable():
    """Switch the tests' shape checks off: while a graph is traced, sizes are symbols and no integers."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def slices(patch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [600 * torch.randn(2, *size, generator=generator) for size in check_sizes(patch)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("config", [FLAT, GATED], ids=["flat", "gated"])
@torch.no_grad()
def test_timm__a_user_gets_the_same_tokens(make_checkpoint, tmp_path, config):
    out = export_model(make_checkpoint(config=config), tmp_path / "m", ["safetensors", "timm"])
    model = meddino.load(out)
    readme = (out / "timm/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0].replace("model.safetensors", str(out / "timm/model.safetensors"))
    for hu in slices(config.patch_size):
        names = {"stored": hu}
        exec(code, names)  # what the folder's own README tells a user to write
        assert close(names["tokens"], all_tokens(model, model.preprocess(hu)))
    assert stat.S_IMODE((out / "timm/model.safetensors").stat().st_mode) == 0o644


def test_timm__a_third_kind_of_backbone_is_refused(tmp_path):
    class Third(Backbone):
        get_intermediate_layers = intermediate_outputs = layer_groups = None

    with pytest.raises(CheckpointError, match="Third"):
        export_timm.export_timm(tmp_path, Model(Third(), random_model("vitnano8").config), ForeignOptions(()))


def test_timm__released_sizes_have_their_plain_names():
    assert timm_model(BACKBONES["vitb16"], has_bias=False) == ("vit_base_patch16_dinov3", {})
    assert timm_model(BACKBONES["vits16plus"], has_bias=True) == ("vit_small_plus_patch16_dinov3_qkvb", {})
    assert timm_model(BACKBONES["vith16plus"], has_bias=False) == ("vit_huge_plus_patch16_dinov3", {})
    for name in ("vits16", "vits16plus", "vitb16"):
        architecture, arguments = timm_model(BACKBONES[name], has_bias=False)
        with torch.device("meta"):
            built = timm.create_model(architecture, **arguments)
        assert built.embed_dim == BACKBONES[name].embed_dim and len(built.blocks) == BACKBONES[name].depth


@pytest.mark.parametrize("config", [FLAT, GATED], ids=["flat", "gated"])
@torch.no_grad()
def test_transformers__a_user_gets_the_same_tokens_and_pixels(make_checkpoint, tmp_path, config, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    out = export_model(make_checkpoint(config=config), tmp_path / "m", ["hf"])
    model = meddino.load(out)
    loaded = transformers.AutoModel.from_pretrained(out / "hf").eval()
    plain = transformers.AutoImageProcessor.from_pretrained(out / "hf")
    whole = transformers.AutoImageProcessor.from_pretrained(out / "hf", trust_remote_code=True)
    assert type(plain).__name__.startswith("ViTImageProcessor") and type(whole).__name__ == "MedDINOImageProcessor"
    for hu in slices(config.patch_size):
        images = model.preprocess(hu)
        pixels = whole(list(hu.numpy()), return_tensors="pt")["pixel_values"]
        clipped = hu.clamp(-900, 1000)[:, None].repeat(1, 3, 1, 1)
        assert close(pixels, images)
        assert close(plain(list(clipped.numpy()), return_tensors="pt")["pixel_values"], images)
        assert close(loaded(pixel_values=pixels).last_hidden_state, all_tokens(model, images))
    with pytest.raises(ValueError, match="expected slices"):
        whole(torch.zeros(1, 3, 8, 8).numpy())
    back = meddino.load(out / "hf")  # and in again through the same door
    assert close(all_tokens(back, images), all_tokens(model, images))


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_transformers__config_describes_every_backbone(name):
    ours = BACKBONES[name]
    again = architecture_from_transformers(transformers_config(ours), name)
    assert transformers_config(again) == transformers_config(ours)
    assert (again.embed_dim, again.depth, again.num_heads) == (ours.embed_dim, ours.depth, ours.num_heads)


@torch.no_grad()
@pytest.mark.timeout(900)
def test_onnx__free_sizes_patch_maps_and_tampering(make_checkpoint, tmp_path, traceable, monkeypatch, capsys):
    # One test, because the exporter takes a quarter of a minute to start.
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    config = FLAT.model_copy(update={"untie_cls_and_patch_norms": True})
    checkpoint = make_checkpoint(config=config)
    out = tmp_path / "m"
    arguments = [str(checkpoint), "--to", "onnx", "--onnx-layers", "0,1", "--out"]
    assert main([*arguments, str(out)]) == 0
    model = meddino.load(out)
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["cls_token", "register_tokens", "patch_tokens", "patch_map_0", "patch_map_1"]
    for shape in ((1, 16, 48), (3, 40, 40), (2, 8, 8)):
        images = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
        found = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
        features = model(images)
        expected = [features.cls_token, features.register_tokens, features.patch_tokens]
        expected += model.get_intermediate_layers(images, [0, 1], reshape=True)
        assert all(close(one, other) for one, other in zip(found, expected, strict=True)), shape

    def tampered(path, *_):
        graph = onnx.load(out / "onnx/model.onnx")
        weight = next(value for value in graph.graph.initializer if value.name.endswith("backbone.norm.weight"))
        values = onnx.numpy_helper.to_array(weight) * 1.001
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))
        onnx.save(graph, path)

    monkeypatch.setattr(export_onnx, "_write", tampered)
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "n")]) == 2
    assert "loaded by onnxruntime, the export does not compute what its source does" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "run"]


@pytest.mark.parametrize(
    ("name", "module", "function"), [("timm", export_timm, "to_timm"), ("hf", export_transformers, "to_transformers")]
)
def test_export__a_tampered_tensor_fails_and_leaves_nothing(
    make_checkpoint, tmp_path, monkeypatch, capsys, name, module, function
):
    original = getattr(module, function)

    def tampered(*arguments):
        tensors = original(*arguments)
        tensors["norm.weight"] = tensors["norm.weight"] * 1.001
        return tensors

    monkeypatch.setattr(module, function, tampered)
    checkpoint = make_checkpoint(config=FLAT)
    assert main([str(checkpoint), "--out", str(tmp_path / "m"), "--to", f"safetensors,{name}"]) == 2
    assert "does not compute what its source does" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export__half_precision_for_other_libraries(make_checkpoint, tmp_path):
    out = export_model(make_checkpoint(config=FLAT), tmp_path / "m", ["timm", "hf"], dtype="bf16")
    assert json.loads((out / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "hf/model.safetensors").stat().st_size < 0.7 * (28_000 * 4)


def test_export__what_a_library_cannot_hold_is_refused(make_checkpoint, tmp_path):
    untied = FLAT.model_copy(update={"untie_cls_and_patch_norms": True})
    for name in ("timm", "hf"):
        with pytest.raises(CheckpointError, match="cannot hold this architecture"):
            export_model(make_checkpoint(config=untied), tmp_path / "m", [name])
    with pytest.raises(CheckpointError, match="this model has blocks 0 to 1"):
        export_model(make_checkpoint(config=FLAT), tmp_path / "m", ["onnx"], onnx_layers=[2])
    assert not (tmp_path / "m").exists()


def test_export__an_absent_library_is_named(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs transformers; install with: pip install 'meddino\[hf\]'"):
        export_model(make_checkpoint(config=FLAT), tmp_path / "m", ["hf"])
