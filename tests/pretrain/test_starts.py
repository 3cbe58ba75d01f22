"""What stage 1 can start from, through the whole trainer: each kind of file, its heads, and the alarm when features drift."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.stages import run_pretraining
from safetensors.torch import save_file
from torch import nn

from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.checkpoints.weights.key_formats import to_timm
from meddino.core.config import load_config
from meddino.core.errors import CheckpointError
from meddino.layers.projection_head import ProjectionHead
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"
CONFIG = ViTConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, layerscale_init=1.0, rope_rescale=2.0, drop_path=0.25)
# A teacher that does not move shows what it was given.
STILL = [f"stages.{STAGE}.method.teacher.ema_momentum=1.0", f"stages.{STAGE}.method.teacher.ema_momentum_end=1.0"]


def lively(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def start(corpus: Path, run: Path, weights: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Take three steps from some weights and return the teacher, which stands still."""
    given = [f"init.weights={weights}", f"stages.{STAGE}.steps=3", *STILL, *overrides]
    run_pretraining(load_config(PretrainConfig, [TINY], given), corpus, run, [STAGE])
    return read_tensors(latest_checkpoint(run / STAGE / "checkpoints").folder, "teacher.")


def official_file(model: VisionTransformer, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "dinov3_vitnano8.pth")
    return str(folder / "dinov3_vitnano8.pth")


def transformers_folder(model: VisionTransformer, folder: Path) -> str:
    transformers = pytest.importorskip("transformers")
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 8}
    theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=4, layer_norm_eps=1e-6, **names))
    lively(theirs).save_pretrained(folder / "hf")
    return str(folder / "hf")


def timm_file(model: VisionTransformer, folder: Path) -> str:
    save_file(to_timm(model.state_dict(), model.config), folder / "timm.safetensors")
    return f"timm:vit_base_patch16_dinov3@{folder / 'timm.safetensors'}"


def own_export(model: VisionTransformer, folder: Path, corpus: Path) -> str:
    start(corpus, folder / "first", official_file(model, folder))
    return str(export_model(folder / "first" / STAGE / "checkpoints" / "step-000000003", folder / "model"))


@torch.no_grad()
def same_features(found: dict[str, torch.Tensor], expected) -> bool:
    backbone = VisionTransformer(CONFIG).eval()
    backbone.load_state_dict({name.removeprefix("backbone."): t for name, t in found.items() if name.startswith("backbone.")})
    for size in ((32, 32), (24, 40)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        if not (backbone(images).patch_tokens - expected(images)).abs().max() <= 2e-5:
            return False
    return True


@pytest.mark.parametrize("kind", ["official", "hf", "timm", "export"])
def test_start__from_every_kind_of_weights(kind, make_corpus_once, tmp_path):
    model = lively(VisionTransformer(CONFIG))
    overrides: list[str] = []

    def expected(images):
        return model(images).patch_tokens

    if kind == "official":
        weights = official_file(model, tmp_path)
    elif kind == "hf":
        weights = transformers_folder(model, tmp_path)
        theirs = pytest.importorskip("transformers").DINOv3ViTModel.from_pretrained(weights).eval()

        def expected(images):
            return theirs(pixel_values=images).last_hidden_state[:, 5:]

    elif kind == "timm":
        with torch.no_grad():
            for block in model.blocks:  # timm's layout has no bias of the keys
                block.attn.qkv.bias[32:64] = 0.0
        weights = timm_file(model, tmp_path)
        overrides = ["init.gaps.missing=[mask_token]"]
    else:
        weights = own_export(model, tmp_path, make_corpus_once)
    found = start(make_corpus_once, tmp_path / "run", weights, *overrides)
    assert same_features(found, expected)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["parent"]["licence"] == "DINOv3 License" and weights in run["stages"][STAGE]["message"]


@pytest.mark.parametrize("heads", ["if_there", "fresh"])
def test_start__from_a_medinov3_file_with_heads(heads, make_corpus_once, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model, head = lively(VisionTransformer(CONFIG)), lively(ProjectionHead(32, 48, hidden_dim=24, bottleneck_dim=12))
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    teacher |= {f"{kind}.{name}": value for kind in ("dino_head", "ibot_head") for name, value in head.state_dict().items()}
    torch.save({"teacher": teacher, "iteration": 7}, tmp_path / "medinov3.pth")
    found = start(make_corpus_once, tmp_path / "run", str(tmp_path / "medinov3.pth"), f"init.heads={heads}")
    assert same_features(found, lambda images: model(images).patch_tokens)
    taken = [
        torch.equal(found[f"{kind}.{name}"], t) for kind in ("dino_head", "ibot_head") for name, t in head.state_dict().items()
    ]
    assert all(taken) if heads == "if_there" else not all(taken)
    assert ("heads: dino_head, ibot_head from the file" in caplog.text) == (heads == "if_there")


def test_start__heads_of_another_size_are_named(make_corpus_once, tmp_path):
    model, head = lively(VisionTransformer(CONFIG)), ProjectionHead(32, 40, hidden_dim=24, bottleneck_dim=12)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    teacher |= {f"dino_head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "file.pth")
    with pytest.raises(
        CheckpointError, match=r"the file's dino_head is .*set method\.heads\.\* to the file's sizes, or init\.heads=fresh"
    ):
        start(make_corpus_once, tmp_path / "run", str(tmp_path / "file.pth"))


def test_start__a_drift_is_told_in_the_log_and_the_report(make_corpus_once, tmp_path, caplog):
    # Fresh heads at a rate far too high, no warm-up, no distillation to the start: what destroys released features.
    model = lively(VisionTransformer(CONFIG))
    careless = [
        f"init.weights={official_file(model, tmp_path)}",
        f"stages.{STAGE}.steps=12",
        f"stages.{STAGE}.schedule.lr=0.5",
        f"stages.{STAGE}.schedule.warmup_steps=0",
        f"stages.{STAGE}.method.teacher.ema_momentum=0.5",
        f"stages.{STAGE}.method.teacher.ema_momentum_end=0.5",
        "probe.every_steps=4",
        "probe.slices=16",
        "saving.report=true",
    ]
    run = tmp_path / "run"
    run_pretraining(load_config(PretrainConfig, [TINY], careless), make_corpus_once, run, [STAGE])
    looks = [record for record in read_metrics(run / STAGE / "metrics.jsonl") if "features/neighbours_kept" in record]
    assert len(looks) == 3
    assert "The features have drifted from the weights the run began with" in caplog.text
    assert "The features have drifted" in (run / "report.html").read_text()
    # The same rate from scratch is no drift: there was nothing to lose.
    caplog.clear()
    run_pretraining(load_config(PretrainConfig, [TINY], careless[1:]), make_corpus_once, tmp_path / "scratch", [STAGE])
    assert "have drifted" not in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "HTML or XML page.*download again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 343\n", "git-lfs pointer.*git lfs pull"),
        (b"PK\x03\x04 cut off", "truncated.*download it again"),
    ],
    ids=["html", "git-lfs", "truncated"],
)
def test_start__a_bad_file_is_one_line(content, says, make_corpus_once, tmp_path, capsys):
    (tmp_path / "dinov3.pth").write_bytes(content)
    given = [f"init.weights={tmp_path / 'dinov3.pth'}", f"stages.{STAGE}.steps=3"]
    assert main([str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meddino-pretrain: error:")]
    assert re.search(says, line) and "dinov3.pth" in line
    assert not list((tmp_path / "run").glob("*/checkpoints/*"))
