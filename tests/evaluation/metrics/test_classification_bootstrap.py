import itertools

import numpy as np
import pytest
from meddino_evaluation.metrics.classification import classification_metric
from meddino_evaluation.metrics.classification_bootstrap import metric_intervals, paired_metric
from meddino_evaluation.metrics.statistics import SHARE, Resampling


def _case(kind="binary", classes=2, rows=40, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.random((rows, classes)).round(1) + 0.05
    if kind == "multilabel":
        return rng.integers(-1, 2, size=(rows, classes)), p / 1.1
    return rng.integers(0, classes, size=rows), p / p.sum(1, keepdims=True)


def test_metric_intervals__one_run_equals_the_plain_bootstrap():
    truth, p = _case()
    groups = [f"p{row // 3}" for row in range(len(truth))]
    fast = metric_intervals("binary", [(groups, truth, p)], names=["auroc"], resamples=200, seed=9)["auroc"]
    drawing = Resampling(len(truth), groups, resamples=200, seed=9)
    samples = [np.repeat(np.arange(len(truth)), counts) for counts in drawing.weights()]
    loop = np.array([classification_metric("auroc", "binary", truth[rows], p[rows]) for rows in samples])
    slow = drawing.interval(classification_metric("auroc", "binary", truth, p), loop, SHARE)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((slow.estimate, slow.low, slow.high))


def test_metric_intervals__of_a_small_calibration_error_is_small():
    truth = np.arange(16) % 2
    sure = np.where(np.arange(16) % 8 == 0, 0.9, 0.99)
    p = np.stack([np.where(truth == 0, sure, 1 - sure), np.where(truth == 1, sure, 1 - sure)], axis=1)
    found = metric_intervals("binary", [(list(range(16)), truth, p)], names=["ece"])["ece"]
    assert 0 <= found.low < found.estimate < found.high < 0.1


@pytest.mark.parametrize(
    ("kind", "classes", "name"), [("binary", 2, "accuracy"), ("ordinal", 3, "kappa"), ("multilabel", 3, "f1")]
)
def test_paired_metric__p_equals_a_loop_that_swaps_patients(kind, classes, name):
    truth, first = _case(kind, classes, rows=21)
    second = _case(kind, classes, rows=21, seed=1)[1]
    patients = np.arange(21) // 3  # seven
    runs = [[(list(patients), truth, p)] for p in (first, second)]
    found = paired_metric(kind, runs[0], runs[1], name, resamples=100)
    sizes = []
    for swapped in itertools.product([False, True], repeat=7):
        mine = np.array(swapped)[patients][:, None]
        a, b = np.where(mine, second, first), np.where(mine, first, second)
        sizes.append(abs(classification_metric(name, kind, truth, a) - classification_metric(name, kind, truth, b)))
    assert found.difference == pytest.approx(
        classification_metric(name, kind, truth, first) - classification_metric(name, kind, truth, second)
    )
    assert found.p_value == pytest.approx(np.mean(np.array(sizes) >= abs(found.difference) - 1e-12))
    assert found.permutations == 0


def test_paired_metric__auroc_does_not_see_the_scale_of_a_model():
    truth, p = _case("binary", 2, rows=20)
    q = _case("binary", 2, rows=20, seed=1)[1]
    squeezed = np.stack([1 - q[:, 1] ** 4, q[:, 1] ** 4], 1)
    groups = list(range(20))
    plain, other = (
        paired_metric("binary", [(groups, truth, p)], [(groups, truth, one)], "auroc", resamples=300) for one in (q, squeezed)
    )
    assert plain == other
    assert plain.permutations == 300


def test_metric_intervals__a_patient_tested_in_five_repeats_counts_once():
    truth, p = _case(rows=60)
    groups = [f"p{row}" for row in range(60)]
    once = metric_intervals("binary", [(groups, truth, p)], names=["accuracy"], resamples=500)["accuracy"]
    five = metric_intervals("binary", [(groups, truth, p)] * 5, names=["accuracy"], resamples=500)["accuracy"]
    assert five.high - five.low == pytest.approx(once.high - once.low)
    others = [(["q" + str(run) + g for g in groups], truth, p) for run in range(5)]
    five_patients = metric_intervals("binary", others, names=["accuracy"], resamples=500)["accuracy"]
    assert five_patients.high - five_patients.low < 0.6 * (once.high - once.low)
