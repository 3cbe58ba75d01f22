"""The label-free numbers, against slow loops and planted cases."""

import math

import numpy as np
import pytest
import torch
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods.base import ProbeOutput
from meddino_pretrain.monitoring.config import ProbeConfig
from meddino_pretrain.monitoring.feature_metrics import (
    MEANINGS,
    AssignmentUse,
    FeatureProbe,
    nearest_distance,
    neighbours_kept,
    rankme,
    similarity_drift,
)
from meddino_pretrain.monitoring.fixed_slices import fixed_slices
from meddino_pretrain.monitoring.pictures import probe_pictures
from torch import nn

from meddino.core.device import find_machine
from meddino.core.errors import CheckpointError
from meddino.data.intensity import CTIntensity
from meddino.models.registry import build_backbone

MACHINE = find_machine("cpu")


class Seeing(nn.Module):
    """A backbone with two linear heads."""

    def __init__(self, choices: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build_backbone("vitnano8", layerscale_init=1.0)
        self.heads = nn.ModuleList([nn.Linear(128, choices), nn.Linear(128, choices)])
        self.eval()

    def probe(self, images) -> ProbeOutput:
        seen = self.backbone(images)
        cls, patch = self.heads[0](seen.cls_token), self.heads[1](seen.patch_tokens[:, ::8].flatten(0, 1))
        return ProbeOutput(seen.cls_token, seen.patch_map, {"cls": cls / 0.07, "patch": patch / 0.07})


@pytest.fixture
def probe(make_corpus, tmp_path) -> FeatureProbe:
    fixed = fixed_slices(make_corpus(count=8), Intensities((CTIntensity(),)), 6, 32)
    return FeatureProbe(fixed, ProbeConfig(every_steps=10, slices=6), MACHINE, tmp_path / "first.safetensors")


def test_feature_probe__measures_what_it_says_it_does(probe):
    numbers = probe.measure(Seeing().probe)
    assert set(numbers) == {f"features/{name}" for name in MEANINGS}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["features/cls_drift"] == 0 and numbers["features/neighbours_kept"] == 1
    assert numbers["features/patch_drift"] < 1e-3  # kept in half precision
    assert numbers == probe.measure(Seeing().probe)


def test_feature_probe__compares_with_the_first_probe_after_a_resume(probe):
    teacher = Seeing()
    probe.measure(teacher.probe)
    with torch.no_grad():
        teacher.backbone.patch_embed.proj.weight.normal_(generator=torch.Generator().manual_seed(5))
    moved = probe.measure(teacher.probe)
    again = FeatureProbe(probe.fixed, probe.config, MACHINE, probe.reference).measure(teacher.probe)
    assert moved["features/patch_drift"] > 0.01
    assert again == pytest.approx(moved, abs=1e-3)


def test_feature_probe__a_foreign_or_damaged_first_probe_is_one_line(probe, make_corpus):
    probe.measure(Seeing().probe)
    other = fixed_slices(make_corpus(count=8, name="other"), Intensities((CTIntensity(),)), 4, 32)
    with pytest.raises(CheckpointError, match="of other slices or another model"):
        FeatureProbe(other, probe.config, MACHINE, probe.reference).measure(Seeing().probe)
    probe.reference.write_bytes(probe.reference.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        FeatureProbe(probe.fixed, probe.config, MACHINE, probe.reference).measure(Seeing().probe)


def test_feature_probe__sees_a_planted_collapse(probe):
    teacher = Seeing()
    healthy = probe.measure(teacher.probe)
    with torch.no_grad():
        teacher.backbone.norm.weight.zero_()
        teacher.backbone.norm.bias.fill_(1.0)
    dead = probe.measure(teacher.probe)
    for name in ("cls_rankme", "patch_rankme"):
        assert abs(dead[f"features/{name}"] - 1) < 0.01 < healthy[f"features/{name}"] - 1
    assert dead["features/nearest_distance"] == pytest.approx(0, abs=1e-6)
    assert abs(dead["features/patch_consistency"] - 0.5) < 1e-6 < healthy["features/patch_consistency"] - 0.5
    assert dead["features/cls_information"] == pytest.approx(0, abs=1e-5) and dead["features/cls_assignments_used"] == 1 / 6


def test_feature_probe__without_patch_tokens_there_are_the_others(probe):
    seeing = Seeing()
    numbers = probe.measure(lambda images: ProbeOutput(seeing.probe(images).cls_token, None))
    assert set(numbers) == {f"features/{name}" for name in ("cls_rankme", "nearest_distance", "cls_drift", "neighbours_kept")}
    assert probe_pictures(lambda images: None, probe.fixed, MACHINE) == {}


def test_feature_probe__due(probe):
    assert [step for step in range(31) if probe.due(step)] == [0, 10, 20, 30]
    never = FeatureProbe(probe.fixed, ProbeConfig(every_steps=0), MACHINE, probe.reference)
    assert not any(never.due(step) for step in range(5))


def test_assignment_use__equals_a_slow_loop():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    use = AssignmentUse()
    use.add(logits[:3] / 0.5)
    use.add(logits[3:] / 0.5)
    rows = [np.exp(row / 0.5) / np.exp(row / 0.5).sum() for row in logits.double().numpy()]
    entropy = sum(-sum(p * math.log(p) for p in row) for row in rows) / 7
    mean = sum(rows) / 7
    numbers = use.numbers()
    assert numbers["entropy"] == pytest.approx(entropy / math.log(5), abs=1e-6)
    assert numbers["information"] == pytest.approx(-sum(p * math.log(p) for p in mean) - entropy, abs=1e-6)
    assert numbers["assignments_used"] == len({int(row.argmax()) for row in rows}) / 5


def test_assignment_use__undecided_and_decided():
    undecided, decided = AssignmentUse(), AssignmentUse()
    undecided.add(torch.zeros(4, 8) / 0.1)
    decided.add(torch.eye(4, 8) * 1000)
    assert undecided.numbers() == pytest.approx({"entropy": 1.0, "information": 0.0, "assignments_used": 0.25}, abs=1e-6)
    assert decided.numbers() == pytest.approx({"entropy": 0.0, "information": math.log(4), "assignments_used": 1.0}, abs=1e-6)


def test_rankme__of_known_spectra():
    assert rankme(torch.eye(6, 10)) == pytest.approx(6, abs=1e-3)
    assert rankme(torch.ones(6, 10)) == pytest.approx(1, abs=1e-3)
    values = np.array([4.0, 2.0, 1.0])
    shares = values / values.sum()
    assert rankme(torch.diag(torch.tensor(values)).float()) == pytest.approx(
        math.exp(-(shares * np.log(shares)).sum()), abs=1e-4
    )


def test_nearest_distance__equals_a_slow_loop():
    features = np.random.default_rng(0).normal(size=(6, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.mean([min(np.linalg.norm(a - b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)])
    assert nearest_distance(torch.from_numpy(features)) == pytest.approx(expected, abs=1e-9)


def test_similarity_drift__equals_a_slow_loop():
    rng = np.random.default_rng(0)
    now, first = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    places = [(b, i, j) for b in range(2) for i in range(3) for j in range(3)]
    squares = [(cosine(now[b, i], now[b, j]) - cosine(first[b, i], first[b, j])) ** 2 for b, i, j in places]
    result = similarity_drift(torch.from_numpy(now), torch.from_numpy(first))
    assert result == pytest.approx(math.sqrt(np.mean(squares)), abs=1e-6)


def test_neighbours_kept__bounds():
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert neighbours_kept(features, features * 3) == 1.0
    assert neighbours_kept(features, other) < 0.4
    assert neighbours_kept(features[:1], other[:1]) == 1.0


@pytest.mark.parametrize("one_size", [False, True])
def test_probe_pictures__are_png_files_of_large_slices(make_corpus, one_size):
    fixed = fixed_slices(make_corpus(count=8), Intensities((CTIntensity(),)), 8, 32, pictured=True)
    sides = []

    def see(images):
        sides.append(images.shape[-1])
        if one_size and images.shape[-1] != 32:
            raise ValueError("built for 32 px")
        return Seeing().probe(images).patch_map

    pictures = probe_pictures(see, fixed, MACHINE)
    assert sides == ([256, 32] if one_size else [256])
    assert set(pictures) == {"pca", "similarity"}
    sizes = {}
    for name, data in pictures.items():
        assert data.startswith(b"\x89PNG")
        sizes[name] = tuple(int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert sizes == {"pca": (6 * 224, 2 * 224), "similarity": (6 * 224, 4 * 224)}
