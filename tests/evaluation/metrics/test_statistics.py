import math

import numpy as np
import pytest
from meddino_evaluation.metrics.statistics import (
    bootstrap_interval,
    bootstrap_mean,
    delong,
    delong_interval,
    holm,
    mean_and_std,
    paired_bootstrap,
    paired_bootstrap_means,
    wilcoxon_signed_rank,
)
from scipy import stats
from sklearn.metrics import roc_auc_score


@pytest.mark.parametrize("patients", [15, 40, 100])
def test_bootstrap_mean__covers_the_truth_as_often_as_it_says(patients):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(2000):
        values = rng.normal(0.7, 0.1, size=patients)
        interval = bootstrap_mean(values, resamples=600, seed=trial)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_bootstrap_mean__draws_patients_not_slices():
    # Slices of a patient are equal: an interval over slices would be three times too narrow.
    rng = np.random.default_rng(1)
    hits = slice_hits = 0
    for trial in range(800):
        patients = np.repeat(np.arange(40), 9)
        values = rng.normal(size=40)[patients]
        by_patient = bootstrap_mean(values, groups=patients, resamples=400, seed=trial)
        by_slice = bootstrap_mean(values, resamples=400, seed=trial)
        hits += by_patient.low <= 0 <= by_patient.high
        slice_hits += by_slice.low <= 0 <= by_slice.high
    assert 0.92 <= hits / 800 <= 0.97
    assert slice_hits / 800 < 0.6


def test_bootstrap_mean__width_for_an_accuracy_of_85_percent():
    correct = np.array([1] * 170 + [0] * 30)
    interval = bootstrap_mean(correct, resamples=5000)
    assert interval.estimate == pytest.approx(0.85)
    assert interval.low == pytest.approx(0.80, abs=0.01)
    assert interval.high == pytest.approx(0.90, abs=0.01)


def test_bootstrap_interval__equals_the_mean_version_and_repeats():
    values = np.random.default_rng(2).normal(size=30)
    groups = [f"p{row // 3}" for row in range(30)]
    general = bootstrap_interval(lambda rows: values[rows].mean(), 30, groups=groups, resamples=300, seed=5)
    short = bootstrap_mean(values, groups=groups, resamples=300, seed=5)
    assert general.estimate == pytest.approx(short.estimate)
    assert (general.low, general.high) == pytest.approx((short.low, short.high))
    assert general == bootstrap_interval(lambda rows: values[rows].mean(), 30, groups=groups, resamples=300, seed=5)


def test_bootstrap_interval__undefined_resamples_are_left_out():
    labels = np.array([1, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.8, 0.3, 0.4, 0.2, 0.1])

    def auroc(rows):
        return roc_auc_score(labels[rows], scores[rows]) if 0 < labels[rows].sum() < len(rows) else math.nan

    interval = bootstrap_interval(auroc, 6, resamples=300)
    assert interval.resamples < 300
    assert interval.low <= interval.estimate <= interval.high
    never = bootstrap_interval(lambda rows: math.nan, 6, resamples=20)
    assert math.isnan(never.low)
    assert math.isnan(never.high)


def test_bootstrap_mean__leaves_out_undefined_cases():
    assert bootstrap_mean([0.5, math.nan, 0.7]).estimate == pytest.approx(0.6)
    assert math.isnan(bootstrap_mean([math.nan]).estimate)
    with pytest.raises(ValueError, match="one number a case"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="3 groups for 2 rows"):
        bootstrap_mean([0.1, 0.2], groups=["a", "b", "c"])


def test_paired_bootstrap__finds_a_difference_and_none():
    rng = np.random.default_rng(3)
    a = rng.normal(0.8, 0.1, size=50)
    better = paired_bootstrap_means(a + 0.02 + rng.normal(0, 0.01, size=50), a, resamples=500)
    assert better.low > 0
    assert better.p_value < 0.01
    same = paired_bootstrap_means(a, a, resamples=100)
    assert same.difference == 0
    assert same.p_value == 1.0
    direct = paired_bootstrap(lambda r: a[r].mean(), lambda r: 0.5 * a[r].mean(), 50, resamples=200)
    assert direct.difference == pytest.approx(0.5 * a.mean())


def test_paired_bootstrap__rejects_a_true_null_about_5_percent_of_the_time():
    rng = np.random.default_rng(4)
    rejected = sum(
        paired_bootstrap_means(rng.normal(size=40), rng.normal(size=40), resamples=300, seed=trial).p_value < 0.05
        for trial in range(300)
    )
    assert 0.02 <= rejected / 300 <= 0.10


def test_wilcoxon__equals_scipy_and_handles_ties():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=20), rng.normal(size=20)
    assert wilcoxon_signed_rank(a, b) == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert wilcoxon_signed_rank(a, a) == 1.0
    assert math.isnan(wilcoxon_signed_rank([math.nan], [1.0]))


def test_holm__literal_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan, 0.5])[[0, 2]] == pytest.approx([0.02, 0.5])
    assert np.isnan(holm([0.01, math.nan])[1])


def _slow_delong(labels, a, b):
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)

    def psi(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    parts = []
    for scores in (a, b):
        v10 = np.array([np.mean([psi(scores[p], scores[n]) for n in negatives]) for p in positives])
        v01 = np.array([np.mean([psi(scores[p], scores[n]) for p in positives]) for n in negatives])
        parts.append((v10, v01))
    s10 = np.cov(parts[0][0], parts[1][0])
    s01 = np.cov(parts[0][1], parts[1][1])
    return parts[0][0].mean(), parts[1][0].mean(), s10 / len(positives) + s01 / len(negatives)


def test_delong__equals_the_definition():
    rng = np.random.default_rng(6)
    labels = np.array([1] * 12 + [0] * 17)
    a = np.round(rng.normal(size=29) + labels, 1)  # rounding makes ties
    b = np.round(rng.normal(size=29) + 0.3 * labels, 1)
    result = delong(labels, a, b)
    auroc_a, auroc_b, covariance = _slow_delong(labels, a, b)
    assert result.auroc_a == pytest.approx(auroc_a) == pytest.approx(roc_auc_score(labels, a))
    assert result.auroc_b == pytest.approx(auroc_b)
    np.testing.assert_allclose(result.covariance, covariance)
    z = (auroc_a - auroc_b) / math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert result.z == pytest.approx(z)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_delong__same_scores_and_too_few_cases():
    labels, scores = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.5, 0.1])
    assert delong(labels, scores, scores).p_value == 1.0
    with pytest.raises(ValueError, match="two cases of each class"):
        delong([1, 0, 0], [1, 2, 3], [1, 2, 3])


def test_delong_interval__covers():
    rng = np.random.default_rng(7)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    labels = np.array([1] * 50 + [0] * 50)
    hits = 0
    for _ in range(600):
        interval = delong_interval(labels, rng.normal(size=100) + labels)
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 600 <= 0.975


def test_mean_and_std__over_seeds():
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_std([1.0])
    assert mean == 1.0
    assert math.isnan(deviation)
