import numpy as np
import pytest
import torch
from meddino_evaluation.adaptation.knn import knn_probabilities, ml_knn_probabilities, nearest, retrieval_per_case
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier


def _features(rows, seed, dim=7):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, dim)))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn__equals_scikit_learn(k):
    train, queries = _features(40, 0), _features(15, 1)
    labels = np.random.default_rng(2).integers(0, 3, 40)
    ours = knn_probabilities(train, labels, queries, classes=3, neighbours=[k], temperature=0.07)[k]

    def weights(distance):  # squared distance of unit vectors = 2 - 2 cosine
        return np.exp((1 - distance**2 / 2) / 0.07)

    unit = [torch.nn.functional.normalize(one, dim=1).numpy() for one in (train, queries)]
    theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(unit[0], labels).predict_proba(unit[1])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_knn__several_k_at_once_and_more_than_there_are():
    train, queries, labels = _features(10, 0), _features(4, 1), np.arange(10) % 2
    together = knn_probabilities(train, labels, queries, classes=2, neighbours=[1, 5, 200])
    for k in (1, 5):
        np.testing.assert_array_equal(together[k], knn_probabilities(train, labels, queries, classes=2, neighbours=[k])[k])
    np.testing.assert_allclose(together[200].sum(1), 1)
    assert nearest(queries, train, 200)[0].shape == (4, 10)


def test_knn__small_temperature_does_not_overflow():
    out = knn_probabilities(_features(10, 0), np.arange(10) % 2, _features(4, 1), classes=2, neighbours=[5], temperature=1e-4)
    assert np.isfinite(out[5]).all()


def test_ml_knn__slow_loop_from_the_paper():
    train, queries = _features(18, 3), _features(6, 4)
    labels = np.random.default_rng(5).integers(0, 2, size=(18, 3))
    k, s = 4, 1.0
    unit = torch.nn.functional.normalize(train, dim=1).numpy()
    unit_queries = torch.nn.functional.normalize(queries, dim=1).numpy()
    expected = np.zeros((6, 3))
    for label in range(3):
        prior = (s + labels[:, label].sum()) / (2 * s + 18)
        with_label, without = np.zeros(k + 1), np.zeros(k + 1)
        for i in range(18):
            order = [j for j in np.argsort(-unit @ unit[i], kind="stable") if j != i][:k]
            count = labels[order, label].sum()
            (with_label if labels[i, label] else without)[count] += 1
        for q in range(6):
            count = labels[np.argsort(-unit @ unit_queries[q], kind="stable")[:k], label].sum()
            yes = prior * (s + with_label[count]) / (s * (k + 1) + with_label.sum())
            no = (1 - prior) * (s + without[count]) / (s * (k + 1) + without.sum())
            expected[q, label] = yes / (yes + no)
    np.testing.assert_allclose(ml_knn_probabilities(train, labels, queries, neighbours=k, smoothing=s), expected, atol=1e-9)


def test_retrieval__average_precision_equals_scikit_learn_and_a_missing_class_is_nan():
    gallery, queries = _features(20, 6), _features(5, 7)
    labels, query_labels = np.arange(20) % 2, np.array([0, 1, 0, 1, 2])
    found = retrieval_per_case(queries, query_labels, gallery, labels, k=5)
    similarity = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    for q in range(4):
        expected = average_precision_score(labels == query_labels[q], similarity[q].numpy())
        assert found["average_precision"][q] == pytest.approx(expected)
        best = int(similarity[q].argmax())
        assert found["precision@1"][q] == (labels[best] == query_labels[q])
    assert np.isnan(found["average_precision"][4])


@pytest.mark.parametrize(("references", "count"), [(60, 3), (60, 20), (12, 12)])
def test_nearest__of_equal_similarities_the_lower_numbers(references, count):
    rng = np.random.default_rng(0)
    # Few different vectors: most of each query's nearest are tied.
    kinds = torch.from_numpy(rng.normal(size=(5, 4)))
    gallery, queries = kinds[rng.integers(0, 5, references)], torch.from_numpy(rng.normal(size=(9, 4)))
    _, numbers = nearest(queries, gallery, count)
    unit = torch.nn.functional.normalize(gallery, dim=1)
    for query, found in zip(torch.nn.functional.normalize(queries, dim=1), numbers.tolist(), strict=True):
        similarity = [round(float(query @ other), 9) for other in unit]
        assert found == sorted(range(references), key=lambda place: (-similarity[place], place))[:count]
