import pytest
import torch
from meddino_evaluation.backbones.adapter import of_model
from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow
from meddino_evaluation.segmentation.networks import build
from meddino_evaluation.segmentation.networks.build import HEADS, HeadRequest, build_head
from meddino_evaluation.segmentation.networks.heads import PrimusHead, PrimusStage
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork
from meddino_evaluation.segmentation.networks.whole_networks import TransUNet, WholeNetwork
from torch import nn

from meddino.checkpoints.export.model import random_model
from meddino.core.errors import ConfigError
from meddino.models.vision_transformer import ViTConfig

SMALL_TRANSFORMER = {"depth": 2, "embed_dim": 96, "num_heads": 3}
REQUEST = HeadRequest([(8, 8)] * 2, 3, 32, 3)


def test_primus__has_25_1_million_parameters_at_16_classes():
    head = PrimusHead([(768, 16)] * 4, 16)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 1) == 25.1
    widths = [(stage.up.in_channels, stage.up.out_channels) for stage in head.stages]
    assert widths == [(3072, 1536), (1536, 768), (768, 384), (384, 192)]


def test_primus__three_stages_at_patch_8():
    head = PrimusHead([(32, 8)] * 4, 3)
    assert len(head.stages) == 3
    assert head([torch.randn(2, 32, 3, 5)] * 4, torch.randn(2, 3, 24, 40)).shape == (2, 3, 24, 40)


def test_primus_stage__equals_the_modules_it_is_named_after():
    torch.manual_seed(0)
    stage = PrimusStage(12, 6)
    nn.init.normal_(stage.up.bias)
    x = torch.randn(2, 12, 5, 4)
    up = stage.up(x)
    wanted = nn.functional.gelu(nn.functional.layer_norm(up.permute(0, 2, 3, 1), (6,), stage.norm.weight, stage.norm.bias))
    torch.testing.assert_close(stage(x.permute(0, 2, 3, 1)), wanted, atol=1e-5, rtol=1e-5)


def test_primus__he_initialised():
    head = build_head("primus", HeadRequest([(64, 16)] * 4, 3, 32, 5), seed=0)
    weight = head.stages[0].up.weight
    fan = weight[0].numel()  # of a transposed convolution: outputs x kernel
    assert abs(float(weight.detach().std()) / (2 / (1 + 1e-4) / fan) ** 0.5 - 1) < 0.02
    assert float(head.stages[0].up.bias.detach().abs().max()) == 0


def test_build_head__depends_on_its_seed_only():
    torch.manual_seed(1)
    first = build_head("linear", REQUEST, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_head("linear", REQUEST, seed=5)
    assert torch.equal(first.classify.weight, second.classify.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.classify.weight, build_head("linear", REQUEST, seed=6).classify.weight)


def test_primus__patch_14_is_resized_to_the_image():
    head = PrimusHead([(16, 14)], 2)
    assert head([torch.randn(1, 16, 2, 3)], torch.randn(1, 3, 28, 42)).shape == (1, 2, 28, 42)


@pytest.mark.parametrize("name", HEADS)
def test_every_head__logits_at_the_image_size_and_a_gradient_everywhere(name, monkeypatch):
    if name == "whole_segformer":
        pytest.importorskip("transformers")
    monkeypatch.setattr(build, "build_transunet", lambda *sizes: WholeNetwork(TransUNet(*sizes, SMALL_TRANSFORMER)))
    request = HeadRequest([(16, 8)] * 4, 3, 64, 4)
    head = build_head(name, request, seed=0)
    images = torch.randn(2, 3, 64, 64)
    logits = head([torch.randn(2, 16, 8, 8) for _ in range(4)], images)
    assert logits.shape == (2, 4, 64, 64)
    logits.square().mean().backward()
    assert not [parameter_name for parameter_name, parameter in head.named_parameters() if parameter.grad is None]


def test_transunet__is_r50_vit_b_16_with_skips_from_the_resnet():
    with torch.device("meta"):
        network = TransUNet(3, 9, 224)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert 100 < millions < 112  # the publication's has 105 million
    assert len(network.encoder.blocks) == 12
    odd = TransUNet(1, 2, 50, SMALL_TRANSFORMER)
    assert odd(torch.randn(2, 1, 50, 50)).shape == (2, 2, 50, 50)


@pytest.mark.parametrize("name", ["primus", "linear", "unet", "dino_unet"])
def test_heads__take_the_pyramid_of_a_convolutional_network(name):
    shapes = [(8, 4), (16, 8), (32, 16), (64, 32)]
    head = build_head(name, HeadRequest(shapes, 3, 64, 4), seed=0)
    maps = [torch.randn(1, channels, 64 // stride, 64 // stride) for channels, stride in shapes]
    assert head(maps, torch.randn(1, 3, 64, 64)).shape == (1, 4, 64, 64)


def test_head_on_no_model__is_refused():
    with pytest.raises(ConfigError, match=r"--model none has none; see head\.name=whole_"):
        build_head("primus", HeadRequest([], 1, 64, 4), seed=0)


@pytest.mark.slow
def test_network__inputs_of_2048_px():
    backbone = of_model("small", random_model(ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=16)))
    network = SegmentationNetwork(backbone, 4, PrimusHead([(32, 16)] * 4, 3), backbone.contract, "frozen").eval()
    with torch.no_grad():
        logits = SlidingWindow(2048)(torch.randn(1, 3, 2048, 2048), network, 0.0)
    assert logits.shape == (1, 3, 2048, 2048)
    assert torch.isfinite(logits).all()
