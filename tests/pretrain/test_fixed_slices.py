"""The slices a run is looked at by, and the measure of patch quality on them."""

import numpy as np
import pytest
import torch
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.monitoring.feature_metrics import patch_consistency, snapshot_scores
from meddino_pretrain.monitoring.fixed_slices import fixed_slices

from meddino.core.device import find_machine
from meddino.core.errors import ShardError
from meddino.data.intensity import CTIntensity
from meddino.data.model_input import normalise
from meddino.models.registry import build_backbone

CONTRACT = CTIntensity()
INTENSITIES = Intensities((CONTRACT,))


def break_samples(corpus, indices):
    for index in indices:
        shard = corpus.root / "shards" / corpus.slices.column("shard")[index].as_py()
        data = bytearray(shard.read_bytes())
        data[corpus.slices.column("offset")[index].as_py() + 40] ^= 0xFF
        shard.write_bytes(bytes(data))


def test_fixed_slices__are_the_same_again_and_spread_over_the_corpus(make_corpus):
    corpus = make_corpus(count=24)
    one, again = (fixed_slices(corpus, INTENSITIES, 4, 32) for _ in range(2))
    assert one.keys == again.keys == ("s00003", "s00009", "s00015", "s00021")
    assert torch.equal(one.first_view, again.first_view) and torch.equal(one.second_view, again.second_view)
    assert one.first_view.shape == one.second_view.shape == (4, 3, 32, 32) and one.grey.shape == (4, 32, 32)


def test_fixed_slices__second_view_is_the_mirrored_anatomy(make_corpus):
    fixed = fixed_slices(make_corpus(count=8), INTENSITIES, 4, 64)
    for first, second in zip(fixed.first_view[:, 0], fixed.second_view[:, 0], strict=True):
        straight = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        mirrored = np.corrcoef(first.flatten(), second.flip(-1).flatten())[0, 1]
        assert mirrored > 0.8 and mirrored > straight


def test_fixed_slices__keep_the_shape_in_millimetres(make_corpus):
    corpus = make_corpus(count=2, rows=40, cols=120, spacing_mm=(3.0, 1.0))  # 120 x 120 mm: all of it is shown
    whole = fixed_slices(corpus, INTENSITIES, 1, 40).first_view[0, 0]
    hu = torch.from_numpy(corpus.read(1).astype(np.float32))
    expected = normalise(torch.nn.functional.avg_pool2d(hu[None, None], (1, 3)), CONTRACT)[0, 0, 0]
    assert (whole - expected).abs().mean() < 0.15


def test_fixed_slices__damaged_ones_are_left_out_and_none_at_all_is_an_error(make_corpus):
    corpus = make_corpus(count=4)
    break_samples(corpus, [1])
    assert fixed_slices(corpus, INTENSITIES, 4, 32).keys == ("s00000", "s00002", "s00003")
    break_samples(corpus, [0, 2, 3])
    with pytest.raises(ShardError, match="none of the 4 slices"):
        fixed_slices(corpus, INTENSITIES, 4, 32)


def slow_consistency(first: np.ndarray, second_mirrored: np.ndarray) -> float:
    second = second_mirrored[:, :, ::-1]
    rows, cols = first.shape[1:]
    places = [(y, x) for y in range(rows) for x in range(cols)]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    won = 0.0
    for y, x in places:
        own = cosine(first[:, y, x], second[:, y, x])
        for v, u in places:
            if (v, u) != (y, x):
                other = cosine(first[:, y, x], second[:, v, u])
                won += 0.5 if abs(other - own) <= 1e-6 else float(other < own)
    return won / (len(places) * (len(places) - 1))


def test_patch_consistency__equals_a_slow_loop():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, 5, 3, 4))
    second = first[..., ::-1] + 0.7 * rng.normal(size=first.shape)
    scores = patch_consistency(torch.from_numpy(first), torch.from_numpy(second.copy()))
    assert scores.tolist() == pytest.approx([slow_consistency(a, b) for a, b in zip(first, second, strict=True)], abs=1e-6)


def test_patch_consistency__bounds():
    tokens = torch.randn(20, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    assert (patch_consistency(tokens, tokens.flip(-1)) == 1.0).all()
    assert patch_consistency(torch.ones(1, 16, 6, 6), torch.ones(1, 16, 6, 6)).item() == pytest.approx(0.5)
    other = torch.randn(20, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    assert patch_consistency(tokens, other).mean().item() == pytest.approx(0.5, abs=0.04)
    # Knowing only one's position is worth nothing: the second view is mirrored.
    position = torch.stack([torch.linspace(-1, 1, 6).expand(6, 6).T, torch.linspace(-1, 1, 6).expand(6, 6)])[None]
    assert patch_consistency(position, position).item() < 0.8
    assert patch_consistency(torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1)).item() == 0.5


def test_patch_consistency__air_does_not_count():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, 5, 3, 4))
    first[0, :, :, 2:] = 1.0  # air: the same everywhere
    second = first + 0.7 * rng.normal(size=first.shape)
    body = torch.zeros(2, 12, 16, dtype=torch.bool)
    body[0, :, :8] = True  # the second slice shows no body at all: all of it counts
    scores = patch_consistency(torch.from_numpy(first), torch.from_numpy(second[..., ::-1].copy()), body)
    expected = [
        slow_consistency(first[0][..., :2], second[0][..., :2][..., ::-1]),
        slow_consistency(first[1], second[1][..., ::-1]),
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_snapshot_scores__one_score_a_slice(make_corpus):
    fixed = fixed_slices(make_corpus(count=8), INTENSITIES, 6, 32)
    backbone = build_backbone("vitnano8").eval()
    scores = snapshot_scores(backbone, fixed, find_machine("cpu"))
    assert scores.shape == (6,) and ((scores > 0.5) & (scores <= 1)).all()
