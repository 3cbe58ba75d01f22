import itertools
import math

import numpy as np
import pytest
from meddino_evaluation.metrics.unpaired import unpaired_means


def test_unpaired_means__p_is_near_the_one_of_all_divisions_of_the_patients():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1, 7), rng.normal(0, 1, 6)
    found = unpaired_means(a, b)
    everyone = np.concatenate([a, b])
    observed, extreme, total = abs(a.mean() - b.mean()), 0, 0
    for chosen in itertools.combinations(range(13), 7):
        other = np.delete(everyone, chosen)
        extreme += abs(everyone[list(chosen)].mean() - other.mean()) >= observed - 1e-12
        total += 1
    assert found.p_value == pytest.approx(extreme / total, abs=0.015)
    assert found.difference == pytest.approx(a.mean() - b.mean())


def test_unpaired_means__interval_covers_the_true_difference():
    rng = np.random.default_rng(1)
    covered = []
    for study in range(200):
        found = unpaired_means(rng.normal(0.3, 1, 15), rng.normal(0, 1.5, 12), resamples=400, seed=study)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_unpaired_means__cases_of_a_patient_are_drawn_together():
    a, b = np.repeat([0.2, 0.8, 0.5, 0.4, 0.6, 0.3], 20), np.linspace(0, 1, 30)
    alone = unpaired_means(a, b)
    together = unpaired_means(a, b, groups_a=np.repeat(np.arange(6), 20))
    assert together.high - together.low > 1.3 * (alone.high - alone.low)


def test_unpaired_means__too_few_patients_have_neither_interval_nor_p():
    found = unpaired_means([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    assert math.isnan(found.p_value) and math.isnan(found.low)
    assert math.isnan(unpaired_means([], [1.0]).difference)
    one = unpaired_means([0.1], np.linspace(0.5, 0.9, 40))  # 2 / 41 < 0.05, and still one patient is no hospital
    assert math.isnan(one.p_value) and math.isnan(one.low)
    assert unpaired_means([0.1, 0.12], np.linspace(0.5, 0.9, 40)).p_value < 0.05


@pytest.mark.parametrize("sizes", [(2, 8), (3, 20), (5, 5), (8, 12)])
def test_unpaired_means__false_positives_are_at_most_5_percent(sizes):
    rng, trials = np.random.default_rng(sum(sizes)), 200
    groups = [[rng.beta(8, 2, size=size).round(2) for size in sizes] for _ in range(trials)]
    found = np.array([unpaired_means(*each, resamples=20, seed=seed).p_value for seed, each in enumerate(groups)])
    assert np.mean(found <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
