import torch
from meddino_evaluation.segmentation.heads import PrimusHead, PrimusStage, build_head
from torch import nn


def test_primus__has_25_1_million_parameters_at_16_classes():
    head = PrimusHead(taps=4, embed_dim=768, patch_size=16, num_outputs=16)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 1) == 25.1
    widths = [(stage.up.in_channels, stage.up.out_channels) for stage in head.stages]
    assert widths == [(3072, 1536), (1536, 768), (768, 384), (384, 192)]


def test_primus__three_stages_at_patch_8():
    head = PrimusHead(taps=4, embed_dim=32, patch_size=8, num_outputs=3)
    assert len(head.stages) == 3
    assert head(torch.randn(2, 4, 32, 3, 5), torch.randn(2, 3, 24, 40)).shape == (2, 3, 24, 40)


def test_primus_stage__equals_the_modules_it_is_named_after():
    torch.manual_seed(0)
    stage = PrimusStage(12, 6)
    nn.init.normal_(stage.up.bias)
    x = torch.randn(2, 12, 5, 4)
    up = stage.up(x)
    wanted = nn.functional.gelu(nn.functional.layer_norm(up.permute(0, 2, 3, 1), (6,), stage.norm.weight, stage.norm.bias))
    torch.testing.assert_close(stage(x.permute(0, 2, 3, 1)), wanted, atol=1e-5, rtol=1e-5)


def test_primus__he_initialised():
    head = build_head("primus", 4, 64, 16, 5, seed=0)
    weight = head.stages[0].up.weight
    fan = weight[0].numel()  # of a transposed convolution: outputs x kernel
    assert abs(float(weight.detach().std()) / (2 / (1 + 1e-4) / fan) ** 0.5 - 1) < 0.02
    assert float(head.stages[0].up.bias.detach().abs().max()) == 0


def test_build_head__depends_on_its_seed_only():
    torch.manual_seed(1)
    first = build_head("linear", 2, 8, 8, 3, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_head("linear", 2, 8, 8, 3, seed=5)
    assert torch.equal(first.classify.weight, second.classify.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.classify.weight, build_head("linear", 2, 8, 8, 3, seed=6).classify.weight)


def test_primus__patch_14_is_resized_to_the_image():
    head = PrimusHead(taps=1, embed_dim=16, patch_size=14, num_outputs=2)
    assert head(torch.randn(1, 1, 16, 2, 3), torch.randn(1, 3, 28, 42)).shape == (1, 2, 28, 42)
