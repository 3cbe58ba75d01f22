"""What an export is compared on and how strictly: slices of a corpus, absolute differences, weights in a file beside."""

import sys

import jaxtyping
import pytest
import torch

from meddino.checkpoints.cli import main
from meddino.checkpoints.export import to_onnx as export_onnx
from meddino.checkpoints.export.comparison import check_sizes, check_slices
from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.weights.key_formats import to_timm, to_transformers
from meddino.core.errors import MedDINOError
from meddino.models.registry import build_backbone
from meddino.models.vision_transformer import VisionTransformer
from tests.pretrain.conftest import disc_slice, write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", [disc_slice(number, 70, 90) for number in range(6)])


def test_check_slices__of_a_corpus(corpus):
    slices = check_slices(8, corpus)
    assert [tuple(hu.shape[-2:]) for hu in slices] == list(check_sizes(8))
    # Body, lungs and air of the third and the fifth slice, as they were stored.
    for hu in slices:
        assert hu.shape[0] == 2 and not torch.equal(hu[0], hu[1])
        assert hu.min() < -900 and hu.max() > 100
        assert abs(hu[0].mean() - float(disc_slice(2, 70, 90).mean())) < 30


def test_export__compares_on_a_corpus(make_checkpoint, corpus, tmp_path, capsys, monkeypatch):
    seen = []
    module = sys.modules[export_model.__module__]
    plain = module.check_slices
    monkeypatch.setattr(module, "check_slices", lambda *given: seen.append(given) or plain(*given))
    assert main([str(make_checkpoint()), "--out", str(tmp_path / "m"), "--corpus", str(corpus)]) == 0
    assert seen == [(8, corpus, "ct")] and (tmp_path / "m" / "config.json").is_file()
    assert main([str(make_checkpoint()), "--out", str(tmp_path / "n"), "--corpus", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "n").exists()


def test_check_slices__of_an_empty_corpus(tmp_path):
    with pytest.raises(MedDINOError, match=r"holds no|no slice"):
        check_slices(8, write_corpus(tmp_path / "empty", []))


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_other_libraries__within_an_absolute_2e_5_at_real_size(library):
    # ViT-S/16 with blocks that count (LayerScale of 0.5) and outputs of the last LayerNorm's scale: up to about 5.
    generator = torch.Generator().manual_seed(0)
    ours = build_backbone("vits16", layerscale_init=0.5).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("bias") or "token" in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    for block in ours.blocks:
        block.attn.qkv.bias[384:768] = 0.0
    if library == "timm":
        theirs = pytest.importorskip("timm").create_model("vit_small_patch16_dinov3_qkvb").eval()
        theirs.load_state_dict(to_timm(ours.state_dict(), ours.config))
        forward = theirs.forward_features
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
        theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=4, **sizes)).eval()
        tensors = to_transformers(ours.state_dict(), ours.config)
        names = {name.removeprefix("model."): name for name in theirs.state_dict()}
        theirs.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})

        def forward(images):
            return theirs(pixel_values=images).last_hidden_state

    for size in check_sizes(16):
        images = torch.randn(1, 3, *size, generator=generator)
        expected = _tokens(ours, images)
        assert 1.0 < expected.abs().max() < 20.0
        assert (forward(images) - expected).abs().max() <= 2e-5


def _tokens(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return torch.cat([output.cls_token[:, None], output.register_tokens, output.patch_tokens], dim=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_onnx__weights_beyond_one_file_lie_beside_it(make_checkpoint, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # while a graph is traced, sizes are no integers
    monkeypatch.setattr(export_onnx, "MAX_INLINE_BYTES", 1000)
    out = export_model(make_checkpoint(), tmp_path / "m", ["onnx"])
    beside = [path for path in (out / "onnx").iterdir() if path.name not in ("model.onnx", "README.md")]
    assert len(beside) == 1 and beside[0].stat().st_size > (out / "onnx" / "model.onnx").stat().st_size / 10
    moved = (out / "onnx").rename(tmp_path / "elsewhere")  # the folder is what is copied
    session = onnxruntime.InferenceSession(moved / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(["cls_token"], {"images": torch.zeros(1, 3, 16, 24).numpy()})[0].shape == (1, 32)
