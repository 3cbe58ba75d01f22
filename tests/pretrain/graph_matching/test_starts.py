"""What graph matching starts from: ImageNet's files of torchvision and timm, SAM's encoder, DINOv3's file, an export."""

import timm
import torch
import torchvision
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.initialization import load_init_weights
from safetensors.torch import save_file

from meddino.checkpoints.weights.load import load_backbone_weights
from meddino.core.config import load_config
from meddino.models.registry import build_backbone
from tests.pretrain.graph_matching.test_method import CONFIG, SMALL_GRAPHS, method_of

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def started(weights: str, backbone: str, recipe="lvm_med_r50", **changes):
    """Return the backbone that a run of a recipe would begin with."""
    method = method_of(CONFIG.model_copy(update={"graph": SMALL_GRAPHS}), backbone=backbone, **changes)
    config = build_backbone(backbone, **changes).config
    init = load_config(PretrainConfig, [recipe], [f"init.weights={weights}"], "pretrain").init
    load_init_weights(load_backbone_weights(weights, config, init.gaps), init.heads, method)
    return method.export().eval()


def test_start__torchvisions_resnet(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    maps = torch.nn.Sequential(*list(theirs.children())[:-2])
    found = started(str(tmp_path / "resnet18.pth"), "timm:resnet18")
    torch.testing.assert_close(found(IMAGES).patch_map, maps(IMAGES))


def test_start__timms_file(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t").eval()
    save_file(theirs.state_dict(), tmp_path / "resnet10t.safetensors")
    found = started(f"timm:resnet10t@{tmp_path / 'resnet10t.safetensors'}", "timm:resnet10t")
    torch.testing.assert_close(found(IMAGES).patch_map, theirs.forward_features(IMAGES))


def test_start__sams_encoder_without_its_neck(tmp_path):
    torch.manual_seed(0)
    size = {**TINY, "img_size": 64, "global_attn_indexes": (0,)}
    theirs = timm.create_model("samvit_base_patch16", **size).eval()
    official = {f"image_encoder.{name.replace('.mlp.fc', '.mlp.lin')}": each for name, each in theirs.state_dict().items()}
    torch.save(official | {"mask_decoder.x.weight": torch.zeros(2)}, tmp_path / "sam_vit_b.pth")
    found = started(str(tmp_path / "sam_vit_b.pth"), "timm:samvit_base_patch16", "lvm_med_vitb", **size, neck_chans=0)
    theirs.neck = torch.nn.Identity()
    last = torch.nn.functional.layer_norm(theirs.forward_features(IMAGES).permute(0, 2, 3, 1), (32,), eps=1e-6)
    torch.testing.assert_close(found(IMAGES).patch_tokens, last.flatten(1, 2))


def test_start__dinov3s_file(tmp_path):
    theirs = build_backbone("vitnano8", **TINY, layerscale_init=1.0).eval()
    torch.save(theirs.state_dict(), tmp_path / "dinov3.pth")
    found = started(str(tmp_path / "dinov3.pth"), "vitnano8", **TINY, layerscale_init=1.0)
    torch.testing.assert_close(found(IMAGES).patch_tokens, theirs(IMAGES).patch_tokens)
