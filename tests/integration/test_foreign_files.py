"""Files of other projects, rebuilt with random weights in their real layouts, through the doors a user has."""

from dataclasses import replace

import pytest
import torch
from meddino_evaluation.backbones.catalogue import CATALOGUE
from meddino_evaluation.backbones.load import load_backbone
from torch import nn

import meddino
from meddino.checkpoints.export.comparison import check_sizes
from meddino.core.errors import CheckpointError
from meddino.models.registry import build_backbone

timm = pytest.importorskip("timm")
TOLERANCE = 2e-5


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((0.5 if "gamma" in name else 0.05) * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


@torch.no_grad()
def same(one, other, patch: int) -> bool:
    generator = torch.Generator().manual_seed(1)
    for size in check_sizes(patch):
        images = torch.randn(1, 3, *size, generator=generator)
        if not (one(images) - other(images)).abs().max() <= TOLERANCE:
            return False
    return True


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2__evaluated_through_timm_and_pointed_there_by_load(tmp_path, name):
    model = lively(timm.create_model(name, dynamic_img_size=True))
    # Facebook's files: one position embedding with CLS in front, the mask token, registers by their own name.
    official = {key.replace("reg_token", "register_tokens"): value for key, value in model.state_dict().items()}
    official["mask_token"] = torch.zeros(1, 384)
    if "reg4" in name:  # timm leaves the CLS position out and adds it to the token
        official["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), official["pos_embed"]], dim=1)
    torch.save(official, tmp_path / "dinov2.pth")
    backbone = load_backbone(f"timm:{name}@{tmp_path / 'dinov2.pth'}")
    assert same(backbone.network.model.forward_features, model.forward_features, 14)
    with pytest.raises(CheckpointError, match=r"is a DINOv2 model.*evaluated but not trained further.*dinov2_vits14@"):
        meddino.load(tmp_path / "dinov2.pth")


def test_medinov3__a_teachers_file_of_real_size(tmp_path):
    model = lively(build_backbone("vits16", qkv_bias=False))
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": {**teacher, "dino_head.last_layer.weight": torch.zeros(2, 3)}}, tmp_path / "file")
    loaded = meddino.load(tmp_path / "file")
    assert loaded.config.architecture.name == "vits16" and not loaded.config.architecture.qkv_bias
    assert same(lambda x: loaded(x).patch_tokens, lambda x: model(x).patch_tokens, 16)


def test_lvm_med_resnet50__evaluated_through_timm(tmp_path):
    model = lively(timm.create_model("resnet50", num_classes=0))
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "lvmmed_resnet50.torch")
    backbone = load_backbone(f"lvmmed_resnet50@{tmp_path / 'lvmmed_resnet50.torch'}")
    assert same(backbone.network.model.forward_features, model.forward_features, 16)
    with pytest.raises(CheckpointError, match=r"is a ResNet; evaluate it with .*lvmmed_resnet50@"):
        meddino.load(tmp_path / "lvmmed_resnet50.torch")


def test_lvm_med_vitb__sams_names_through_a_users_door(tmp_path, monkeypatch):
    # The image encoder of SAM under its official names, as LVM-Med's checkpoint has it, with the decoder beside; small.
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64, "global_attn_indexes": (2,)}
    monkeypatch.setitem(CATALOGUE, "lvmmed_vitb16", replace(CATALOGUE["lvmmed_vitb16"], arguments=small))
    model = lively(timm.create_model("samvit_base_patch16", num_classes=0, **small))
    names = {name: name.replace(".mlp.fc", ".mlp.lin") for name in model.state_dict()}
    official = {f"image_encoder.{names[name]}": value for name, value in model.state_dict().items()}
    official |= {
        "mask_decoder.iou_token.weight": torch.zeros(1, 256),
        "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256),
    }
    torch.save(official, tmp_path / "lvmmed_vit.pth")
    backbone = load_backbone(f"lvmmed_vitb16@{tmp_path / 'lvmmed_vit.pth'}")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (backbone.network.model.forward_features(images) - model.forward_features(images)).abs().max() <= TOLERANCE
    plain = {names[name]: value for name, value in model.state_dict().items()}
    torch.save(plain, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"position embeddings, no DINOv3.*lvmmed_vitb16@"):
        meddino.load(tmp_path / "plain.pth")
