"""MONAI's SlidingWindowInferer drives our segmentation networks as they are."""

import pytest
import torch
from meddino_evaluation.backbones.adapter import of_model
from meddino_evaluation.nnunet.network import MedDINONetwork
from meddino_evaluation.segmentation.networks.heads import PrimusHead
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork
from monai.inferers import SlidingWindowInferer

from meddino.checkpoints.export.model import random_model
from meddino.models.vision_transformer import ViTConfig

SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8)


@pytest.fixture
def network() -> SegmentationNetwork:
    backbone = of_model("small", random_model(SMALL))
    return SegmentationNetwork(backbone, 4, PrimusHead([(32, 8)] * 4, 3), backbone.contract, "frozen").eval()


@torch.no_grad()
def test_monai__one_window_is_the_network_itself(network):
    images = torch.randn(2, 3, 48, 48)
    found = SlidingWindowInferer(roi_size=(48, 48), sw_batch_size=2)(images, network)
    assert torch.allclose(found, network(images), atol=1e-5)


@torch.no_grad()
def test_monai__many_windows_cover_any_size(network):
    found = SlidingWindowInferer(roi_size=(32, 32), overlap=0.5, mode="gaussian")(torch.randn(1, 3, 70, 53), network)
    assert found.shape == (1, 3, 70, 53) and torch.isfinite(found).all()


@torch.no_grad()
def test_monai__the_network_for_nnunet():
    network = MedDINONetwork(SMALL, 2).eval()
    slices = torch.randn(1, 1, 40, 40)
    found = SlidingWindowInferer(roi_size=(40, 40))(slices, network)
    assert torch.allclose(found, network(slices), atol=1e-5)
