"""Each objective trains on each kind of backbone; its loss is that of its paper, written as a loop."""

import math

import pytest
import torch
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.methods.base import StageSetting
from meddino_pretrain.methods.config import MultiCropConfig
from meddino_pretrain.methods.joint_embedding.config import JointEmbeddingConfig
from meddino_pretrain.methods.joint_embedding.method import JointEmbedding
from meddino_pretrain.methods.joint_embedding.objectives import Embeddings, build_loss, objective_loss
from meddino_pretrain.schedules import StepValues
from torch.nn.functional import normalize

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError
from meddino.models.registry import build_backbone
from tests.pretrain.graph_matching.test_method import batch_of

OBJECTIVES = ("simclr", "moco_v3", "barlow_twins", "vicreg", "vicregl", "dino", "swav", "lejepa")
CROPS = MultiCropConfig(large_px=32, small_px=16)
torch.manual_seed(0)
ONE, OTHER, THIRD = torch.randn(3, 6, 5).unbind()


def config_of(objective, **changes):
    return JointEmbeddingConfig(objective=objective, crops=CROPS, hidden_dim=16, out_dim=8, prototypes=12, **changes)


def method_of(objective, backbone, **changes):
    torch.manual_seed(0)
    setting = StageSetting(4, 7, BatchShare(8), find_machine("cpu"))
    return JointEmbedding.build(config_of(objective), build_backbone(backbone, **changes), setting)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("backbone", "changes"),
    [("vitnano8", {"embed_dim": 32, "depth": 1, "num_heads": 2, "layerscale_init": 1.0}), ("timm:resnet10t", {})],
)
def test_objective__takes_two_steps_and_the_same_again(objective, backbone, changes):
    def two_steps():
        method = method_of(objective, backbone, **changes)
        optimizer, found = torch.optim.SGD(method.model.parameters(), 0.01), []
        for step in range(2):
            values = StepValues(0.01, 0.0, own=method.scheduled(step))
            for losses in method.losses([batch_of(range(8))], values, step):
                optimizer.zero_grad()
                losses["total"].backward()
                found.append(losses["total"].item())
            optimizer.step()
            method.after_step(values)
        unused = [name for name, each in method.model.named_parameters() if each.requires_grad and each.grad is None]
        assert not unused  # or DDP would wait for them
        return found, method

    (first, method), (again, _) = two_steps(), two_steps()
    assert first == again and all(math.isfinite(each) for each in first)
    assert ("teacher" in method.networks()) == (objective in ("dino", "moco_v3"))
    assert ("loss" in method.networks()) == bool(method.loss.state_dict())


def test_simclr__is_the_cross_entropy_of_the_other_view_among_all():
    config = config_of("simclr")
    every = normalize(torch.cat([ONE, OTHER]), dim=-1)
    total = 0.0
    for i in range(12):
        similar = [math.exp((every[i] @ every[k]).item() / 0.1) for k in range(12)]
        total -= math.log(similar[(i + 6) % 12] / (sum(similar) - similar[i])) / 12
    assert objective_loss(config, build_loss(config), Embeddings([ONE, OTHER])).item() == pytest.approx(total, rel=1e-5)


def test_moco_v3__is_its_algorithm_over_all_pairs():
    config = config_of("moco_v3", temperature=0.2)

    def loop(queries, keys):
        queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
        total = 0.0
        for i in range(6):
            logits = [(queries[i] @ keys[j]).item() / 0.2 for j in range(6)]
            total -= (logits[i] - math.log(sum(map(math.exp, logits)))) / 6
        return 2 * 0.2 * total

    found = objective_loss(config, build_loss(config), Embeddings([ONE, OTHER], [THIRD], [OTHER * 2, ONE + 1]))
    pairs = [(ONE, ONE + 1), (OTHER, OTHER), (THIRD, OTHER), (THIRD, ONE + 1)]
    assert found.item() == pytest.approx(sum(loop(*pair) for pair in pairs) / 4, rel=1e-5)


def test_barlow_twins__is_the_correlation_matrix_less_the_identity():
    config = config_of("barlow_twins")
    one, other = ((each - each.mean(0)) / each.std(0, unbiased=False) for each in (ONE, OTHER))
    total = 0.0
    for i in range(5):
        for j in range(5):
            correlation = sum(one[b, i] * other[b, j] for b in range(6)).item() / 6
            total += (1 - correlation) ** 2 if i == j else 5e-3 * correlation**2
    assert objective_loss(config, build_loss(config), Embeddings([ONE, OTHER])).item() == pytest.approx(total, rel=1e-3)


def test_vicreg__is_invariance_variance_and_covariance():
    config = config_of("vicreg")

    def spread(z):
        return sum(max(0, 1 - math.sqrt(z[:, d].var().item() + 1e-4)) for d in range(5)) / 5

    def covariance(z):
        matrix = (z - z.mean(0)).T @ (z - z.mean(0)) / 5
        return sum(matrix[i, j].item() ** 2 for i in range(5) for j in range(5) if i != j) / 5

    variance = (spread(ONE) + spread(OTHER)) / 2
    wanted = 25 * (ONE - OTHER).square().mean().item() + 25 * variance + covariance(ONE) + covariance(OTHER)
    assert objective_loss(config, build_loss(config), Embeddings([ONE, OTHER])).item() == pytest.approx(wanted, rel=1e-4)


def test_dino__is_the_cross_entropy_of_other_views():
    config = JointEmbeddingConfig(objective="dino", prototypes=5)
    total = 0.0
    for t, teacher in enumerate((OTHER, ONE)):
        for s, student in enumerate((ONE, OTHER, THIRD)):
            if s != t:
                targets = (teacher / 0.04).softmax(-1)
                total -= (targets * (student / 0.1).log_softmax(-1)).sum(-1).mean().item() / 4
    seen = Embeddings([ONE, OTHER], [THIRD], [OTHER, ONE])
    assert objective_loss(config, build_loss(config), seen).item() == pytest.approx(total, rel=1e-4)


def test_swav__predicts_balanced_codes_of_the_other_views():
    config = JointEmbeddingConfig(objective="swav")

    def codes(scores):
        plan = (scores / 0.05).exp()
        for _ in range(3):
            plan = plan / plan.sum(0, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        return plan

    views = [ONE / 5, OTHER / 5, THIRD / 5]
    total = 0.0
    for t in range(2):
        for s in range(3):
            if s != t:
                total -= (codes(views[t]) * (views[s] / 0.1).log_softmax(-1)).sum(-1).mean().item() / 4
    assert objective_loss(config, build_loss(config), Embeddings(views[:2], views[2:])).item() == pytest.approx(total, rel=1e-4)


def test_lejepa__is_prediction_of_the_mean_and_a_gaussian_along_random_directions():
    config = config_of("lejepa")
    loss = build_loss(config)
    torch.manual_seed(3)
    found = objective_loss(config, loss, Embeddings([ONE, OTHER], [THIRD])).item()
    torch.manual_seed(3)
    directions = torch.randn(5, 1024)
    directions = directions / directions.norm(dim=0)
    t = torch.linspace(-3, 3, 33)
    window = torch.exp(-t.square() / 2)
    statistics = []
    for view in (ONE, OTHER, THIRD):
        angles = (view @ directions)[:, :, None] * t
        error = (angles.cos().mean(0) - window).square() + angles.sin().mean(0).square()
        statistics.append(6 * torch.trapezoid(error * window, t, dim=-1).mean())
    centre = (ONE + OTHER) / 2
    prediction = torch.stack([(centre - view).square().mean() for view in (ONE, OTHER, THIRD)]).mean()
    wanted = 0.95 * prediction + 0.05 * torch.stack(statistics).mean()
    assert found == pytest.approx(wanted.item(), rel=1e-4)


def test_build__one_slice_in_a_micro_batch_is_too_few():
    setting = StageSetting(4, 7, BatchShare(2, 0, 1, 2), find_machine("cpu"))
    with pytest.raises(ConfigError, match="1 slice in each is too few"):
        JointEmbedding.build(config_of("simclr"), build_backbone("vitnano8", depth=1), setting)
