import numpy as np
import pytest
from meddino_evaluation.metrics.figures import (
    FORMATS,
    confusion_figure,
    forest_figure,
    mean_roc,
    reliability_figure,
    roc_figure,
    save_figures,
)
from meddino_evaluation.metrics.text_table import Table
from sklearn.metrics import roc_auc_score


def outcome(seed: int, cases: int = 200, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, cases)
    scores = rng.normal(size=(cases, classes)) + 1.5 * np.eye(classes)[truth]
    return truth, np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_mean_roc__its_area_is_the_mean_auroc(classes):
    runs = [outcome(seed, classes=classes) for seed in range(3)]
    rates, sensitivity = mean_roc(runs)
    numbers = [1] if classes == 2 else range(classes)
    areas = [roc_auc_score(truth == number, p[:, number]) for truth, p in runs for number in numbers]
    assert np.trapezoid(sensitivity, rates) == pytest.approx(np.mean(areas), abs=0.006)  # of 101 rates
    assert (sensitivity[0], sensitivity[-1]) == (0.0, 1.0)


def test_mean_roc__unknown_labels_are_left_out_and_nothing_to_draw_is_nan():
    truth, probabilities = np.array([[0], [1], [-1], [1], [0]]), np.array([[0.1], [0.9], [0.0], [0.8], [0.2]])
    assert mean_roc([(truth, probabilities)])[1][1:].tolist() == [1.0] * 100
    assert np.isnan(mean_roc([(np.zeros(4, dtype=int), outcome(0, 4)[1])])[1]).all()


def test_confusion_figure__cells_are_counted_over_runs():
    runs = [(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])), (np.array([1]), np.array([[0.6, 0.4]]))]
    drawing = confusion_figure(runs, ("no", "yes"), "knn")
    assert [text.get_text() for text in drawing.axes[0].texts] == ["0.50\n(1)", "0.50\n(1)", "0.50\n(1)", "0.50\n(1)"]


def test_reliability_figure__points_are_the_bins_by_hand():
    truth, probabilities = outcome(0)
    line = reliability_figure({"linear": [(truth, probabilities)]}).axes[0].lines[1]
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    inside = (confidence >= 0.7) & (confidence < 0.8)
    found = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert found[confidence[inside].mean()] == right[inside].mean()


@pytest.mark.parametrize("kind", FORMATS)
def test_save_figures__every_format_with_equal_bytes(tmp_path, kind):
    for folder in ("a", "b"):
        drawn = {
            "roc": roc_figure({"knn": [outcome(0)]}, {"knn": 0.9}),
            "set: forest": forest_figure([("b - a", 0.1, 0.05, 0.2), ("c - a", 0.0, np.nan, np.nan)], "difference"),
        }
        save_figures(drawn, tmp_path / folder, kind)
    for name in ("roc", "set_forest"):
        data = (tmp_path / "a" / f"{name}.{kind}").read_bytes()
        assert data == (tmp_path / "b" / f"{name}.{kind}").read_bytes()
        assert data.startswith({"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[kind])


def test_table__the_best_is_bold_where_bold_can_be_written(tmp_path):
    rows = (("a", "0.9 ± 0.1", "0.2"), ("b", "0.8", "0.1"), ("c", "–", "0.1"))
    table = Table(("model", "auroc", "ece"), rows).best_in_bold((), ("auroc",), ("ece",))
    assert table.markdown().splitlines()[2:] == ["| a | **0.9 ± 0.1** | 0.2 |", "| b | 0.8 | **0.1** |", "| c | – | **0.1** |"]
    assert r"\textbf{0.9 $\pm$ 0.1}" in table.latex()
    assert table.csv().splitlines()[1:] == ["a,0.9 ± 0.1,0.2", "b,0.8,0.1", "c,–,0.1"]
