"""LVM-Med's own files load for comparison, under the names with which its authors' code loads them, strictly.

ResNet-50: torchvision's names, or VISSL's `classy_state_dict`; `segmentation_models_pytorch/encoders/__init__.py` there tries
one after the other. ViT-B: SAM's image encoder with its neck and without a position embedding (`use_abs_pos = False` in
`segment_anything/our_vit.py`, filled by `load_state_dict` without exceptions).
"""

import logging
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from meddino_evaluation.backbones.catalogue import CATALOGUE
from meddino_evaluation.backbones.load import load_backbone

from meddino.checkpoints.weights.load import load_backbone_weights
from meddino.models.registry import build_backbone

DIM, DEPTH, GLOBAL, PX = 32, 3, (2,), 64
SMALL = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "img_size": PX, "global_attn_indexes": GLOBAL}
IMAGES = torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def resnet_file(kind: str, theirs: torch.nn.Module) -> dict:
    trunk = {name: each for name, each in theirs.state_dict().items() if not name.startswith("fc.")}
    if kind == "VISSL":
        named = {f"_feature_blocks.{name}": each for name, each in trunk.items()}
        model = {"trunk": named, "heads": {"0.weight": torch.zeros(2)}}
        return {"classy_state_dict": {"train": True, "base_model": {"model": model, "meta": {}}}, "iteration": 7}
    return theirs.state_dict() if kind == "with classifier" else {kind + name: each for name, each in trunk.items()}


@pytest.mark.parametrize("kind", ["", "module.", "with classifier", "VISSL"])
def test_lvmmed_resnet50__the_files_names_give_torchvisions_features(kind, tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    monkeypatch.setitem(CATALOGUE, "lvmmed_resnet50", replace(CATALOGUE["lvmmed_resnet50"], architecture="resnet18"))
    torch.save(resnet_file(kind, theirs), file := tmp_path / "lvmmed_resnet.torch")
    with caplog.at_level(logging.INFO):
        found = load_backbone(f"lvmmed_resnet50@{file}")
    left_out = "2 tensors that the backbone does not have are left out (fc.weight"
    assert (left_out in caplog.text) == (kind == "with classifier") and caplog.text.count("left out") <= 1
    with torch.inference_mode():
        pooled = torch.nn.Sequential(*list(theirs.children())[:-1])(IMAGES).flatten(1)
        torch.testing.assert_close(found.network.tokens(IMAGES).cls_token, pooled)
    backbone = build_backbone("timm:resnet18").eval()
    weights = load_backbone_weights(file, backbone.config)  # what a training begins with
    weights.load_into(backbone)
    assert not weights.coverage.missing and not weights.coverage.unexpected
    with torch.inference_mode():
        torch.testing.assert_close(backbone.tokens(IMAGES).cls_token, pooled)


@pytest.mark.slow
def test_lvmmed_resnet50__at_its_real_size(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    torch.save(resnet_file("", theirs), file := tmp_path / "lvmmed_resnet.torch")
    found = load_backbone(f"lvmmed_resnet50@{file}")
    with torch.inference_mode():
        pooled = torch.nn.Sequential(*list(theirs.children())[:-1])(IMAGES).flatten(1)
        torch.testing.assert_close(found.network.tokens(IMAGES).cls_token, pooled)


def vit_file(dim: int = DIM, depth: int = DEPTH, heads: int = 2, global_blocks=GLOBAL, side: int = PX // 16) -> dict:
    """Every name and shape of the authors' encoder, written out from their code."""
    shapes = {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    for block in range(depth):
        relative = (2 * (side if block in global_blocks else 14) - 1, dim // heads)
        inside = {
            "norm1.weight": (dim,), "norm1.bias": (dim,), "attn.rel_pos_h": relative, "attn.rel_pos_w": relative,
            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.lin1.weight": (4 * dim, dim),
            "mlp.lin1.bias": (4 * dim,), "mlp.lin2.weight": (dim, 4 * dim), "mlp.lin2.bias": (dim,),
        }  # fmt: skip
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in inside.items()}
    shapes |= {"neck.0.weight": (256, dim, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    shapes |= {f"neck.{norm}.{name}": (256,) for norm in (1, 3) for name in ("weight", "bias")}
    random = torch.Generator().manual_seed(1)
    return {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def test_lvmmed_vitb16__the_files_names_fill_the_encoder_with_nothing_missing_or_left(tmp_path, monkeypatch, caplog):
    entry = CATALOGUE["lvmmed_vitb16"]
    monkeypatch.setitem(CATALOGUE, "lvmmed_vitb16", replace(entry, arguments={**entry.arguments, **SMALL}))
    torch.save(given := vit_file(), file := tmp_path / "lvmmed_vit.pth")
    with caplog.at_level(logging.INFO):
        found = load_backbone(f"lvmmed_vitb16@{file}")
    assert "left out" not in caplog.text and len(found.network.state_dict()) == len(given)
    theirs = timm.create_model("samvit_base_patch16", num_classes=0, use_abs_pos=False, **SMALL).eval()
    theirs.load_state_dict({name.replace(".mlp.lin", ".mlp.fc"): each for name, each in given.items()}, strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(found.network.tokens(IMAGES).patch_map, theirs.forward_features(IMAGES))
    backbone = build_backbone("timm:samvit_base_patch16", **SMALL, use_abs_pos=False).eval()
    weights = load_backbone_weights(file, backbone.config)
    weights.load_into(backbone)
    assert not weights.coverage.fresh and not weights.coverage.left_out
    with torch.inference_mode():
        torch.testing.assert_close(backbone(IMAGES).patch_map, theirs.forward_features(IMAGES))


def test_lvmmed_vitb16__has_the_real_encoders_names_and_shapes():
    with torch.device("meta"):
        entry = CATALOGUE["lvmmed_vitb16"]
        model = timm.create_model(entry.architecture, num_classes=0, **entry.arguments)
        wanted = {name.replace(".mlp.fc", ".mlp.lin"): tuple(each.shape) for name, each in model.state_dict().items()}
    assert wanted == {name: tuple(each.shape) for name, each in vit_file(768, 12, 12, (2, 5, 8, 11), 64).items()}
