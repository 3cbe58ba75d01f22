"""Weights into a model: from every door, completely, or every gap named."""

import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import meddino
from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.weights.coverage import LoadingTolerances
from meddino.checkpoints.weights.distcp import _Unpickler
from meddino.checkpoints.weights.find_weights import find_weights
from meddino.checkpoints.weights.infer_architecture import architecture_from_transformers, backbone_name
from meddino.checkpoints.weights.key_formats import to_timm
from meddino.checkpoints.weights.load import load_backbone_weights, resample_patch_weights
from meddino.core.errors import CheckpointError
from meddino.layers.projection_head import ProjectionHead
from meddino.models.registry import BACKBONES, backbone_config
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

CONFIG = ViTConfig(embed_dim=64, depth=2, num_heads=4, norm_eps=1e-5, rope_rescale=2.0)


def lively(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    model = VisionTransformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def same(one: VisionTransformer, other: VisionTransformer) -> bool:
    images = torch.randn(1, one.config.in_chans, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return bool((one(images).patch_tokens - other(images).patch_tokens).abs().max() <= 2e-5)


def loaded(source, config: ViTConfig = CONFIG, **gaps) -> VisionTransformer:
    model = VisionTransformer(config).eval()
    load_backbone_weights(source, config, LoadingTolerances(**gaps)).load_into(model)
    return model


def trainer_file(path, model: VisionTransformer, prefix: str = "") -> None:
    head = ProjectionHead(64, 12, hidden_dim=8, bottleneck_dim=4)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    teacher |= {f"{kind}.{name}": value for kind in ("dino_head", "ibot_head") for name, value in head.state_dict().items()}
    torch.save({"teacher": {prefix + name: value for name, value in teacher.items()}, "iteration": 5}, path)


def test_load__official_file_and_plain_safetensors(tmp_path):
    model = lively(CONFIG)
    torch.save(model.state_dict(), tmp_path / "dinov3.pth")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("dinov3.pth", "plain.safetensors"):
        weights = load_backbone_weights(tmp_path / name, CONFIG)
        assert weights.coverage.is_complete and weights.coverage.layout == "official"
        assert weights.parent.licence == "DINOv3 License" and len(weights.parent.sha256 or "") == 64
        assert same(loaded(tmp_path / name), model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_load__trainer_file_with_heads(tmp_path, prefix):
    model = lively(CONFIG)
    trainer_file(tmp_path / "teacher.pth", model, prefix)
    weights = load_backbone_weights(tmp_path / "teacher.pth", CONFIG)
    assert same(loaded(tmp_path / "teacher.pth"), model)
    assert weights.coverage.other_parts == {"dino_head": 7, "ibot_head": 7}
    assert weights.heads["ibot_head"]["last_layer.weight"].shape == (12, 4)
    text = weights.coverage.text()
    assert "section 'teacher'" in text and "not backbone" in text and (not prefix or f"prefix '{prefix}'" in text)


def test_load__bias_mask_and_bf16_periods_as_official_files_have_them(tmp_path):
    model = lively(CONFIG)
    state = model.state_dict()
    assert state["blocks.0.attn.qkv.bias"][64:128].any()  # masked, so without effect
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    torch.save(state, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth"), model)


def test_load__our_export_and_our_checkpoint(make_checkpoint, small_config, tmp_path):
    checkpoint = make_checkpoint()
    model = VisionTransformer(small_config).eval()
    model.load_state_dict(read_tensors(checkpoint, "teacher.backbone."))
    out = export_model(checkpoint, tmp_path / "model", dtype="bf16")
    assert same(loaded(checkpoint, small_config), model)
    assert same(loaded(checkpoint.parents[2], small_config), model)
    weights = load_backbone_weights(out, small_config)
    assert weights.parent.licence == "DINOv3 License" and weights.tensors["cls_token"].dtype == torch.float32
    student = load_backbone_weights(checkpoint, small_config, section="student")
    assert not torch.equal(student.tensors["cls_token"], model.cls_token)
    assert meddino.load(checkpoint).contract.hu_min == -900
    assert same(meddino.load(checkpoint.parents[2]).backbone, model)


def test_fit__gaps_fail_unless_named(tmp_path):
    state = lively(CONFIG).state_dict()
    del state["mask_token"], state["blocks.1.norm1.bias"]
    state |= {"extra.weight": torch.zeros(2), "cls_token": torch.zeros(1, 1, 32)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        loaded(tmp_path / "w.pth")
    for text in (
        "nothing was loaded",
        "missing 2: mask_token [1, 64], blocks.1.norm1.bias [64]",
        "unexpected 1: extra.weight [2]",
        "wrong shape 1: cls_token [1, 1, 32] instead of [1, 1, 64]",
    ):
        assert text in str(caught.value), str(caught.value)
    state["cls_token"] = torch.zeros(1, 1, 64)
    torch.save(state, tmp_path / "w.pth")
    model = VisionTransformer(CONFIG)
    before = model.blocks[1].norm1.bias.clone()
    gaps = LoadingTolerances(missing=("mask_token", "blocks.*.norm1.bias"), unexpected=("extra.*",))
    weights = load_backbone_weights(tmp_path / "w.pth", CONFIG, gaps)
    weights.load_into(model)
    assert weights.coverage.fresh == ["mask_token", "blocks.1.norm1.bias"]
    assert torch.equal(model.blocks[1].norm1.bias, before)


def test_fit__input_channels_by_summation(tmp_path):
    model = lively(CONFIG)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    one_channel = CONFIG.model_copy(update={"in_chans": 1})
    with pytest.raises(CheckpointError, match=r"wrong shape.*patch_embed\.proj\.weight"):
        loaded(tmp_path / "w.pth", one_channel)
    small = loaded(tmp_path / "w.pth", one_channel, sum_input_channels=True)
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert (small(grey).patch_tokens - model(grey.repeat(1, 3, 1, 1)).patch_tokens).abs().max() < 2e-5


def test_fit__patch_size_by_resampling(tmp_path):
    torch.save(lively(CONFIG).state_dict(), tmp_path / "w.pth")
    finer = CONFIG.model_copy(update={"patch_size": 8})
    with pytest.raises(CheckpointError, match="wrong shape"):
        loaded(tmp_path / "w.pth", finer)
    weights = load_backbone_weights(tmp_path / "w.pth", finer, LoadingTolerances(resample_patches=True))
    assert weights.coverage.adapted == {"patch_embed.proj.weight": "resampled from 16 to 8 px"}


@pytest.mark.parametrize("size", [10, 16])
def test_resample__a_resized_patch_keeps_its_embedding(size):
    # FlexiViT's defining property, exact when the new patch is the larger one.
    weight, patch = torch.randn(5, 2, 8, 8), torch.randn(3, 2, 8, 8)
    larger = functional.interpolate(patch, (size, size), mode="bicubic", align_corners=False)
    expected = functional.conv2d(patch, weight)
    assert torch.allclose(functional.conv2d(larger, resample_patch_weights(weight, size)), expected, atol=1e-4)


def test_fit__qkv_bias(tmp_path):
    without = CONFIG.model_copy(update={"qkv_bias": False})
    model = lively(without)
    torch.save(model.state_dict(), tmp_path / "without.pth")
    with pytest.raises(CheckpointError, match=r"missing +2: blocks\.0\.attn\.qkv\.bias"):
        loaded(tmp_path / "without.pth")
    assert same(loaded(tmp_path / "without.pth", qkv_bias="zeros"), model)
    torch.save(lively(CONFIG).state_dict(), tmp_path / "with.pth")
    with pytest.raises(CheckpointError, match=r"unexpected +2"):
        loaded(tmp_path / "with.pth", without)
    loaded(tmp_path / "with.pth", without, qkv_bias="drop")


def test_fit__a_free_keys_bias_is_not_lost_silently(tmp_path):
    torch.save(lively(CONFIG.model_copy(update={"mask_k_bias": False})).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="keys' bias is not zero"):
        loaded(tmp_path / "w.pth")


def test_fit__registers(tmp_path):
    fewer, more = (CONFIG.model_copy(update={"num_registers": count}) for count in (2, 6))
    model = lively(CONFIG)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for config in (fewer, more):
        with pytest.raises(CheckpointError, match="wrong shape"):
            loaded(tmp_path / "w.pth", config)
    assert torch.equal(loaded(tmp_path / "w.pth", fewer, registers="cut").storage_tokens, model.storage_tokens[:, :2])
    grown = loaded(tmp_path / "w.pth", more, registers="fresh").storage_tokens
    assert torch.equal(grown[:, :4], model.storage_tokens) and grown[:, 4:].any()
    none = lively(CONFIG.model_copy(update={"num_registers": 0}))
    torch.save(none.state_dict(), tmp_path / "none.pth")
    loaded(tmp_path / "none.pth", registers="fresh")
    with pytest.raises(CheckpointError, match=r"missing +1: storage_tokens"):
        loaded(tmp_path / "none.pth")
    loaded(tmp_path / "w.pth", none.config, registers="cut")


def test_fit__another_rope_base_is_named(tmp_path):
    torch.save(lively(CONFIG.model_copy(update={"rope_base": 50.0})).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="rope_base 50 instead of 100"):
        loaded(tmp_path / "w.pth")


def test_find__not_finite_and_other_models_are_named(tmp_path):
    state = lively(CONFIG).state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 0] = float("inf")
    torch.save(state, tmp_path / "inf.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinity \(blocks.0.mlp.fc1.weight\).*fp16"):
        find_weights(tmp_path / "inf.pth")
    others = {
        "dinov2": {"pos_embed": torch.zeros(1, 5, 768), "blocks.0.ls1.gamma": torch.zeros(768)},
        "ResNet": {"layer1.0.conv1.weight": torch.zeros(1)},
        "position embeddings, no DINOv3": {"pos_embed": torch.zeros(1, 5, 768), "blocks.0.attn.qkv.weight": torch.zeros(1)},
        "first names: a": {"a": torch.zeros(1)},
    }
    for message, tensors in others.items():
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=f"(?i){message}"):
            find_weights(tmp_path / "other.pth")


def test_find__half_a_backbone(tmp_path):
    state = lively(CONFIG).state_dict()
    del state["blocks.0.mlp.fc1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no complete DINOv3 backbone.*fc1"):
        find_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["vits16", "vits16plus", "vitnano8"])
def test_infer__the_architecture_comes_back_from_the_tensors(tmp_path, name):
    with torch.random.fork_rng():
        state = VisionTransformer(backbone_config(name, norm_eps=1e-5)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    found = find_weights(tmp_path / "w.safetensors").config
    assert backbone_name(found) == name
    assert found == BACKBONES[name].model_copy(update={"norm_eps": 1e-5})


def test_infer__heads_need_periods_or_a_released_size(tmp_path):
    state = {name: value for name, value in lively(CONFIG).state_dict().items() if "periods" not in name}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="number of attention heads is not in the file"):
        find_weights(tmp_path / "w.safetensors")


def test_infer__transformers_configs_of_other_models():
    with pytest.raises(CheckpointError, match="model_type 'vit', not 'dinov3_vit'"):
        architecture_from_transformers({"model_type": "vit"}, "config.json")
    with pytest.raises(CheckpointError, match="has no 'hidden_size'"):
        architecture_from_transformers({"model_type": "dinov3_vit"}, "config.json")


def test_find__timm_names_read_the_local_cache_only(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match="timm has no model 'vit_none'"):
        find_weights("timm:vit_none")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    with pytest.raises(CheckpointError, match="not on this machine, and nothing is downloaded"):
        find_weights("timm:vit_small_patch16_dinov3")
    model = timm.create_model("vit_small_patch16_dinov3").eval()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(tmp_path / "timm.safetensors"))
    for source in ("timm:vit_small_patch16_dinov3", f"timm:vit_small_patch16_dinov3@{tmp_path / 'timm.safetensors'}"):
        found = meddino.load(source)
        assert found.config.architecture.name == "vits16" and found.lineage.licence == "DINOv3 License"
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_features(images)[:, 5:]
        assert (found.forward_features(images).patch_tokens - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("record", ["backbone_registers", "backbone_plain", "backbone_swiglu_untied"])
def test_load__recorded_weights_of_the_reference(shared_reference, tmp_path, record):
    recorded = load_file(shared_reference / f"{record}.safetensors")
    state = {name.removeprefix("weights."): value for name, value in recorded.items() if name.startswith("weights.")}
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in state.items()}}, tmp_path / "teacher.pth")
    # The recorded model has the trainer's epsilon, which no file tells.
    config = find_weights(tmp_path / "teacher.pth").config.model_copy(update={"norm_eps": 1e-6})
    model = loaded(tmp_path / "teacher.pth", config)
    cases = sorted({name.partition(".")[0] for name in recorded if name.startswith("case")})
    assert len(cases) >= 1
    for case in cases:
        with torch.no_grad():
            output = model(recorded[f"{case}.input"])
        assert (output.cls_token - recorded[f"{case}.cls_token"]).abs().max() <= 2e-5
        assert (output.patch_tokens - recorded[f"{case}.patch_tokens"]).abs().max() <= 2e-5


def test_fit__another_number_of_heads_is_named(tmp_path):
    torch.save(lively(CONFIG).state_dict(), tmp_path / "w.pth")
    more = CONFIG.model_copy(update={"num_heads": 8})
    with pytest.raises(CheckpointError, match="attention heads 4 instead of 8"):
        loaded(tmp_path / "w.pth", more)


def test_load__a_timm_file_of_an_unusual_size_takes_the_heads_from_the_model(tmp_path):
    model = lively(CONFIG.model_copy(update={"qkv_bias": False}))
    save_file(to_timm(model.state_dict(), model.config), tmp_path / "timm.safetensors")
    with pytest.raises(CheckpointError, match="number of attention heads is not in the file"):
        find_weights(tmp_path / "timm.safetensors")
    assert same(loaded(tmp_path / "timm.safetensors", model.config, missing=("mask_token",)), model)


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["model.", "model.backbone.", "encoder.", "module._orig_mod."])
def test_find_weights__prefixes_of_lightning_and_wrappers_are_taken_off(tmp_path, prefix):
    model = lively(CONFIG)
    torch.save({"state_dict": _prefixed(prefix, model.state_dict()), "epoch": 3}, tmp_path / "last.ckpt")
    assert same(loaded(tmp_path / "last.ckpt"), model)


def test_find_weights__block_chunks_are_counted_on(tmp_path):
    model = lively(CONFIG)
    chunked = {
        "blocks.0." + name.removeprefix("blocks.") if name.startswith("blocks.") else name: value
        for name, value in model.state_dict().items()
    }
    torch.save(chunked, tmp_path / "chunked.pth")
    assert same(loaded(tmp_path / "chunked.pth"), model)


def test_find_weights__a_folder_of_torch_distributed_checkpoint(tmp_path):
    from torch.distributed import checkpoint

    model, other = lively(CONFIG), lively(CONFIG, seed=1)
    state = _prefixed("teacher.backbone.", model.state_dict()) | _prefixed("student.backbone.", other.state_dict())
    checkpoint.save(
        {"model": state, "optimizer": {"step": torch.ones(3)}}, checkpoint_id=tmp_path / "ckpt" / "999", no_dist=True
    )
    assert same(loaded(tmp_path / "ckpt" / "999"), model)
    assert any("torch.distributed.checkpoint" in note for note in find_weights(tmp_path / "ckpt" / "999").notes)
    with pytest.raises(CheckpointError, match=r"\.distcp files"):
        find_weights(tmp_path / "ckpt")
    shard = next((tmp_path / "ckpt" / "999").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="promises"):
        find_weights(tmp_path / "ckpt" / "999")


@pytest.mark.parametrize(
    ("owner", "name", "is_read"), [("_MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT", True), ("Metadata", "__init__", False)]
)
def test_unpickler__getattr_gives_members_of_enumerations_alone(owner, name, is_read):
    """Python 3.11.0 to 3.11.3 pickle members of enumerations so."""
    module = "torch.distributed.checkpoint.metadata"
    written = f"cbuiltins\ngetattr\n(c{module}\n{owner}\nV{name}\ntR.".encode()
    if is_read:
        assert _Unpickler(io.BytesIO(written)).load().name == name
    else:
        with pytest.raises(CheckpointError, match=r"would call builtins\.getattr"):
            _Unpickler(io.BytesIO(written)).load()


def test_find_weights__metadata_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "a.distcp").write_bytes(b"")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"would call (_)?io\.open"):
        find_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
