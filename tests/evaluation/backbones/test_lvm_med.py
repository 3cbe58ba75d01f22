"""LVM-Med's own files load for comparison: a ResNet-50 of torchvision's names, a ViT-B of SAM's."""

import torch
import torchvision
from meddino_evaluation.backbones.load import load_backbone


def test_lvmmed_resnet50__torchvisions_names_give_torchvisions_features(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    for prefix in ("", "module."):
        file = tmp_path / f"lvmmed_resnet{prefix}.torch"
        torch.save({f"{prefix}{name}": each for name, each in theirs.state_dict().items() if not name.startswith("fc.")}, file)
        found = load_backbone(f"lvmmed_resnet50@{file}")
        images = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            pooled = torch.nn.Sequential(*list(theirs.children())[:-1])(images).flatten(1)
            torch.testing.assert_close(found.network.tokens(images).cls_token, pooled)
