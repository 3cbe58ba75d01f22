import math

import numpy as np
import pytest
from meddino_evaluation.metrics.delong import delong
from meddino_evaluation.metrics.statistics import (
    Resampling,
    bootstrap_mean,
    can_be_significant,
    holm,
    mean_and_std,
    paired_means,
    smallest_p,
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


def test_bootstrap_mean__equals_a_loop_over_resampled_patients_and_repeats():
    values = np.random.default_rng(2).normal(size=30)
    groups = [f"p{row // 3}" for row in range(30)]
    drawn = Resampling(30, groups, resamples=300, seed=5).weights()
    loop = [np.repeat(values, counts).mean() for counts in drawn]
    fast = bootstrap_mean(values, groups=groups, resamples=300, seed=5)
    t, wider = stats.t.ppf(0.975, 9), math.sqrt(10 / 9)
    low, high = np.quantile(loop, [stats.norm.cdf(-t * wider), stats.norm.cdf(t * wider)])
    width = t * wider * np.std(loop)
    assert (fast.low, fast.high) == pytest.approx((min(low, values.mean() - width), max(high, values.mean() + width)))
    assert fast == bootstrap_mean(values, groups=groups, resamples=300, seed=5)


def test_interval__none_where_it_could_not_hold():
    assert not math.isnan(bootstrap_mean([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).low)
    assert math.isnan(bootstrap_mean([0.1, 0.2, 0.3, 0.4, 0.5]).low)
    assert math.isnan(bootstrap_mean(np.arange(12.0), groups=np.arange(12) % 4).low)  # twelve cases of four patients
    all_right = bootstrap_mean(np.ones(40))
    assert all_right.estimate == 1.0
    assert math.isnan(all_right.low)
    assert math.isnan(all_right.high)


@pytest.mark.parametrize("span", [(0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)])
def test_interval__is_symmetric_on_a_scale_without_ends_and_stays_within_its_span(span):
    values = np.array([0.2, 0.4, 0.4, 0.3, 0.5, 0.4])
    drawing = Resampling(6, resamples=400)
    drawn = drawing.means(values)
    narrow = 0.9 + 1e-6 * (drawn - drawn.mean())  # percentiles that lie within the other interval
    estimate = 0.9 + 1e-9

    def scale(x):
        return math.log(x - span[0]) - (0.0 if math.isinf(span[1]) else math.log(span[1] - x))

    found = drawing.interval(estimate, narrow, span)
    half_width = stats.t.ppf(0.975, 5) * math.sqrt(6 / 5) * narrow.std()
    slope = (scale(estimate + 1e-5) - scale(estimate - 1e-5)) / 2e-5
    low, high = (scale(estimate) + sign * half_width * slope for sign in (-1, 1))
    assert scale(found.low) <= low + 1e-9
    assert scale(found.high) >= high - 1e-9
    wide = drawing.interval(0.9, 0.9 + 5 * (drawn - drawn.mean()).clip(-0.02, 0.02), span)
    assert span[0] <= wide.low < wide.high <= span[1]
    at_an_end = drawing.interval(span[0], drawn, span)
    assert (at_an_end.low, at_an_end.high) == (span[0], pytest.approx(np.quantile(drawn, 1), abs=0.1))


def test_interval__undefined_resamples_are_left_out():
    drawing = Resampling(8, resamples=300)
    drawn = drawing.means(np.arange(8.0))
    drawn[:100] = math.nan
    interval = drawing.interval(3.5, drawn)
    assert interval.resamples == 200
    assert interval.low <= 3.5 <= interval.high
    drawn[:200] = math.nan
    assert math.isnan(drawing.interval(3.5, drawn).low)


def test_bootstrap_mean__leaves_out_undefined_cases():
    assert bootstrap_mean([0.5, math.nan, 0.7]).estimate == pytest.approx(0.6)
    assert math.isnan(bootstrap_mean([math.nan]).estimate)
    with pytest.raises(ValueError, match="one number a case"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="3 groups for 2 rows"):
        bootstrap_mean([0.1, 0.2], groups=["a", "b", "c"])


def test_paired_means__finds_a_difference_and_none():
    rng = np.random.default_rng(3)
    a = rng.normal(0.8, 0.1, size=50)
    better = paired_means(a + 0.02 + rng.normal(0, 0.01, size=50), a, resamples=500)
    assert better.low > 0
    assert better.p_value < 0.01
    assert better.permutations == 9999
    assert better.smallest_p == 1 / 10_000
    same = paired_means(a, a, resamples=100)
    assert same.difference == 0
    assert same.p_value == 1.0


@pytest.mark.parametrize("patients", [6, 9, 13])
def test_paired_means__p_equals_scipys_permutation_test(patients):
    rng = np.random.default_rng(patients)
    for a, b in ((rng.normal(0.3, 1, patients), rng.normal(size=patients)), rng.integers(0, 4, (2, patients)) / 4):
        found = paired_means(a, b, resamples=100)
        scipys = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert found.p_value == pytest.approx(scipys.pvalue)
        assert found.permutations == 0
        assert found.smallest_p == 2 / 2**patients


def test_paired_means__drawn_permutations_come_near_the_exact_value():
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.4, 1, 16), rng.normal(size=16)
    exact = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired_means(a, b, resamples=100).p_value == pytest.approx(exact, abs=5 * math.sqrt(exact / 9999))


def test_paired_means__a_patients_cases_change_sign_together():
    rng = np.random.default_rng(9)
    patients = np.repeat(np.arange(8), 5)
    a, b = rng.normal(size=40), rng.normal(size=40)
    sums = np.array([(a - b)[patients == p].sum() for p in range(8)])
    by_hand = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired_means(a, b, groups=patients, resamples=100).p_value == pytest.approx(by_hand)


def test_smallest_p__two_of_all_sign_patterns():
    assert [smallest_p(n) for n in (1, 2, 5, 6, 10)] == [1.0, 0.5, 0.0625, 0.03125, 2 / 1024]
    assert [n for n in range(21) if can_be_significant(n)] == list(range(6, 21))
    withheld = paired_means([0.9, 0.8], [0.1, 0.2])
    assert math.isnan(withheld.p_value)
    assert withheld.smallest_p == 0.5


@pytest.mark.parametrize("patients", [6, 13, 20])
def test_wilcoxon__equals_scipy(patients):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=patients), rng.normal(size=patients)
    assert wilcoxon_signed_rank(a, b) == pytest.approx(stats.wilcoxon(a, b).pvalue)
    a, b = rng.integers(0, 5, (2, patients)) / 4
    assert wilcoxon_signed_rank(a, b) == pytest.approx(stats.wilcoxon(a - b).pvalue)


def test_wilcoxon__no_difference_no_case_and_few_patients():
    a = np.arange(20.0)
    assert wilcoxon_signed_rank(a, a) == 1.0
    assert math.isnan(wilcoxon_signed_rank([math.nan], [1.0]))
    assert math.isnan(wilcoxon_signed_rank(a, -a, groups=np.arange(20) % 5))
    assert wilcoxon_signed_rank(a + 1, -a, groups=np.arange(20) % 10) == pytest.approx(2 / 2**10)


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
    return parts[0][0].mean(), parts[1][0].mean(), s10 / len(positives), s01 / len(negatives)


def test_delong__equals_the_definition():
    rng = np.random.default_rng(6)
    labels = np.array([1] * 12 + [0] * 17)
    a = np.round(rng.normal(size=29) + labels, 1)  # rounding makes ties
    b = np.round(rng.normal(size=29) + 0.3 * labels, 1)
    result = delong(labels, a, b)
    auroc_a, auroc_b, *parts = _slow_delong(labels, a, b)
    covariance = parts[0] + parts[1]
    assert result.auroc_a == pytest.approx(auroc_a) == pytest.approx(roc_auc_score(labels, a))
    assert result.auroc_b == pytest.approx(auroc_b)
    np.testing.assert_allclose(result.covariance, covariance)
    z = (auroc_a - auroc_b) / math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert result.z == pytest.approx(z)
    first, second = (part[0, 0] + part[1, 1] - 2 * part[0, 1] for part in parts)
    freedom = (first + second) ** 2 / (first**2 / 11 + second**2 / 16)  # Satterthwaite
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(z), freedom))


def test_delong__same_scores_and_too_few_cases():
    labels, scores = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.5, 0.1])
    assert delong(labels, scores, scores).p_value == 1.0
    assert math.isnan(delong(labels, labels, [0.5] * 4).p_value)  # perfect against blind: a difference without any spread
    with pytest.raises(ValueError, match="two cases of each class"):
        delong([1, 0, 0], [1, 2, 3], [1, 2, 3])


def test_mean_and_std__over_seeds():
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_std([1.0])
    assert mean == 1.0
    assert math.isnan(deviation)
