"""The projection head against its formula and the records."""

import math

import torch
from safetensors.torch import load_file

from meddino.layers.projection_head import ProjectionHead


def test_forward__equals_the_formula():
    head = ProjectionHead(5, 7, hidden_dim=6, bottleneck_dim=4)
    x = torch.randn(3, 5)
    weights = head.state_dict()
    hidden = x
    for number in (0, 2):
        hidden = hidden @ weights[f"mlp.{number}.weight"].T + weights[f"mlp.{number}.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    bottleneck = hidden @ weights["mlp.4.weight"].T + weights["mlp.4.bias"]
    bottleneck = bottleneck / bottleneck.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(x, no_last_layer=True), bottleneck)
    torch.testing.assert_close(head(x), bottleneck @ weights["last_layer.weight"].T)
    torch.testing.assert_close(head(bottleneck, only_last_layer=True), head(x))


def test_state_dict__official_names():
    assert set(ProjectionHead(5, 7, 6, 4).state_dict()) == {
        *(f"mlp.{number}.{kind}" for number in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight",
    }


def test_forward__recorded(shared_reference):
    records = load_file(shared_reference / "losses.safetensors")
    weights = {name.removeprefix("head.weights."): value for name, value in records.items() if name.startswith("head.weights.")}
    prototypes, bottleneck = weights["last_layer.weight"].shape
    hidden, dim = weights["mlp.0.weight"].shape
    head = ProjectionHead(dim, prototypes, hidden, bottleneck, layers=sum(name.endswith("bias") for name in weights))
    head.load_state_dict(weights)
    torch.testing.assert_close(head(records["head.input"]), records["head.output"], atol=1e-5, rtol=0)


def test_unit_prototypes__start_with_length_one_and_the_rest_as_ever():
    torch.manual_seed(0)
    plain = ProjectionHead(5, 7, 6, 4)
    torch.manual_seed(0)
    unit = ProjectionHead(5, 7, 6, 4, unit_prototypes=True)
    assert torch.allclose(unit.last_layer.weight.norm(dim=1), torch.ones(7))
    assert torch.equal(unit.mlp[0].weight, plain.mlp[0].weight)
    expected = plain.last_layer.weight / plain.last_layer.weight.norm(dim=1, keepdim=True)
    assert torch.allclose(unit.last_layer.weight, expected)
