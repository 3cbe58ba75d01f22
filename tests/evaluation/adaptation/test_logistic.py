import numpy as np
from meddino_evaluation.adaptation.logistic import fit_logistic
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def test_fit_logistic__every_c_equals_scikit_learn_alone():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)) * 3 + 1, rng.integers(0, 3, 60)
    strengths = np.logspace(-6, 5, 45)
    fitted = fit_logistic(x, labels, strengths.tolist(), kind="multiclass", classes=3, max_steps=5000)
    assert len(fitted) == 45
    scaler = StandardScaler().fit(x)
    for place in (0, 20, 44):
        alone = LogisticRegression(C=strengths[place], max_iter=5000, tol=1e-8).fit(scaler.transform(x), labels)
        theirs = alone.predict_proba(scaler.transform(x))
        np.testing.assert_allclose(fitted[place].probabilities(x, "multiclass"), theirs, atol=2e-3)


def test_fit_logistic__several_labels_with_unknown_ones_and_a_constant_one():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 4))
    labels = np.stack([(x[:, 0] > 0).astype(int), np.zeros(40, int), np.where(rng.random(40) < 0.3, -1, x[:, 1] > 0)], 1)
    out = fit_logistic(x, labels, [1.0], kind="multilabel", classes=3)[0].probabilities(x, "multilabel")
    assert ((out[:, 0] > 0.5) == (x[:, 0] > 0)).mean() > 0.9
    assert (out[:, 1] == 0).all()
    assert ((out[:, 2] > 0.5) == (x[:, 1] > 0)).mean() > 0.8


def test_fit_logistic__a_class_that_train_lacks_gets_probability_zero():
    x = np.random.default_rng(2).normal(size=(20, 3))
    out = fit_logistic(x, np.arange(20) % 2 * 2, [1.0], kind="multiclass", classes=3)[0].probabilities(x, "multiclass")
    assert (out[:, 1] == 0).all()
