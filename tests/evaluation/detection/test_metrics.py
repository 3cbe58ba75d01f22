import math

import numpy as np
import pytest
import torch
from meddino_evaluation.detection.config import MetricsConfig
from meddino_evaluation.detection.metrics import ImageResult, coco_ap, froc, match, paired_ap50, summarise, weighted_ap

IOUS = np.round(np.linspace(0.5, 0.95, 10), 12).tolist()


def random_results(seed, images=12, classes=3, patients=4):
    """Boxes, and detections near them, beside them and twice; scores with ties."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(images):
        count = int(rng.integers(0, 4))
        corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(5, 40, (count, 2))
        boxes = np.concatenate([corner, corner + side], 1)
        labels = rng.integers(1, classes, count)  # the last class has no box
        near = np.concatenate([boxes + rng.normal(0, 2.5, boxes.shape), boxes + rng.normal(0, 6, boxes.shape)])
        lost, size = rng.uniform(0, 60, (3, 2)), rng.uniform(5, 40, (3, 2))
        found = np.concatenate([near, np.concatenate([lost, lost + size], 1)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_labels = np.concatenate([labels, labels, rng.integers(1, classes + 1, 3)])
        scores = np.round(rng.uniform(0, 1, len(found)), 1)
        made.append(ImageResult(f"i{number}", f"p{number % patients}", boxes, labels, found, found_labels, scores))
    return made


def slow_matches(results, label, iou):
    """(score, image, found) of each detection of a class: greedily, the surest first, to the free box it overlaps most."""
    rows = []
    for number, one in enumerate(results):
        boxes = [box for box, own in zip(one.boxes, one.labels, strict=True) if own == label]
        order = sorted((k for k in range(len(one.scores)) if one.found_labels[k] == label), key=lambda k: -one.scores[k])
        free = set(range(len(boxes)))
        for k in order:
            best, place = iou, None
            for b in sorted(free):
                width = min(boxes[b][2], one.found[k][2]) - max(boxes[b][0], one.found[k][0])
                height = min(boxes[b][3], one.found[k][3]) - max(boxes[b][1], one.found[k][1])
                shared = max(0, width) * max(0, height)
                areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (boxes[b], one.found[k])]
                if shared / (sum(areas) - shared) >= best:
                    best, place = shared / (sum(areas) - shared), b
            free.discard(place)
            rows.append((one.scores[k], number, place is not None))
    return rows


def slow_froc(results, label, iou, rate):
    """Try every score as a threshold; keep the best sensitivity with few enough false positives."""
    rows, boxes = slow_matches(results, label, iou), sum(int((one.labels == label).sum()) for one in results)
    best = 0.0
    for threshold in {score for score, _, _ in rows}:
        kept = [found for score, _, found in rows if score >= threshold]
        if (len(kept) - sum(kept)) / len(results) <= rate:
            best = max(best, sum(kept) / boxes)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_ap__equal_to_torchmetrics_and_by_weights_to_pycocotools(seed):
    detection = pytest.importorskip("torchmetrics.detection")
    results = random_results(seed)
    exact = {"iou_thresholds": IOUS, "rec_thresholds": np.linspace(0, 1, 101).tolist()}  # its own are rounded to 32 bits
    metric = detection.MeanAveragePrecision(class_metrics=True, backend="pycocotools", **exact)
    metric.update(
        [
            {"boxes": torch.tensor(r.found), "scores": torch.tensor(r.scores), "labels": torch.tensor(r.found_labels)}
            for r in results
        ],
        [{"boxes": torch.tensor(r.boxes), "labels": torch.tensor(r.labels)} for r in results],
    )
    theirs, ours = metric.compute(), coco_ap(results, 3)
    assert np.isnan(ours[:, 2]).all()  # a class without boxes has no number
    assert float(theirs["map"]) == pytest.approx(np.nanmean(ours), abs=1e-5)
    assert float(theirs["map_50"]) == pytest.approx(np.nanmean(ours[0]), abs=1e-5)
    once = np.ones((1, len(results)), dtype=np.int64)
    for place, own in enumerate(match(results, 3, IOUS)):
        ap = [weighted_ap(own, threshold, once)[0] for threshold in range(10)]
        assert ap == pytest.approx(list(ours[:, place]), abs=1e-12, nan_ok=True)


def test_weighted_ap__an_image_that_counts_twice_is_that_image_twice():
    results, rng = random_results(9), np.random.default_rng(0)
    for result in results:
        result.scores[:] = rng.permutation(1000)[: len(result.scores)] / 1000 + rng.uniform(0, 1e-4)  # no ties
    weights = rng.integers(0, 3, (5, len(results)))
    for row in weights:
        repeated = [one for one, times in zip(results, row, strict=True) for _ in range(times)]
        expected = coco_ap(repeated, 2)[0]
        found = [weighted_ap(own, 0, row[None])[0] for own in match(results, 2, IOUS)]
        assert found == pytest.approx(list(expected), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("iou", [0.3, 0.5])
def test_froc__equal_to_a_slow_loop(iou):
    rates = (0.1, 0.25, 0.5, 1.0, 4.0)
    for seed in range(5):
        results = random_results(seed)
        once = np.ones((1, len(results)), dtype=np.int64)
        for place, own in enumerate(match(results, 3, [iou])):
            if own.boxes.any():
                expected = [slow_froc(results, place + 1, iou, rate) for rate in rates]
                assert froc(own, 0, rates, once)[0] == pytest.approx(expected)
            else:
                assert np.isnan(froc(own, 0, rates, once)).all()


def test_froc__known_numbers_by_hand():
    box = np.array([[0.0, 0, 10, 10]])
    far = np.array([[50.0, 50, 60, 60]])
    one = np.ones(1, dtype=np.int64)
    hit = ImageResult("a", "a", box, one, np.concatenate([box, far]), np.ones(2, dtype=np.int64), np.array([0.9, 0.8]))
    miss = ImageResult("b", "b", box, one, far, one, np.array([0.95]))
    (own,) = match([hit, miss], 1, [0.5])
    once = np.ones((1, 2), dtype=np.int64)
    # By score: false (0.95), true (0.9), false (0.8): half of the boxes from half a false positive an image on.
    assert froc(own, 0, (0.25, 0.5, 1.0), once)[0].tolist() == [0.0, 0.5, 0.5]


def test_summarise__perfect_detections_and_intervals_over_patients():
    results = [
        ImageResult(r.name, r.patient, r.boxes, r.labels, r.boxes, r.labels, np.ones(len(r.labels)))
        for r in random_results(1, images=40, patients=20)
    ]
    found = summarise([results, results], ["a", "b", "c"], MetricsConfig(resamples=50))
    assert found["metrics"]["ap50_95"]["mean"] == pytest.approx(1)
    assert found["metrics"]["sensitivity"]["mean"] == pytest.approx(1)
    assert math.isnan(found["by_class"]["c"]["ap50"])
    assert "class c" in found["notes"][0]
    half = summarise([random_results(3, images=40, patients=20)], ["a", "b", "c"], MetricsConfig(resamples=200))
    ap50 = half["metrics"]["ap50"]
    assert ap50["low"] < ap50["mean"] < ap50["high"]
    few = summarise([random_results(3, images=8, patients=4)], ["a", "b", "c"], MetricsConfig(resamples=50))
    assert math.isnan(few["metrics"]["ap50"]["low"])  # four patients have no interval


def test_paired_ap50__difference_of_both_and_no_difference_of_one_model():
    good, bad = random_results(2, images=30, patients=10), random_results(2, images=30, patients=10)
    for one in bad:
        one.found[:] += 12  # every detection beside its box
    result = paired_ap50([good, good], [bad, bad], 2, resamples=200)
    assert result.difference == pytest.approx(np.nanmean(coco_ap(good, 2)[0]) - np.nanmean(coco_ap(bad, 2)[0]))
    assert result.low < result.difference < result.high
    assert result.p_value < 0.05
    same = paired_ap50([good], [good], 2, resamples=200)
    assert same.difference == 0
    assert same.p_value == 1


def two_detectors(rng, patients):
    """Two models that are equally good on one image of each patient; the second's scores are on another scale."""
    quality, models = rng.normal(size=patients), []
    for scale, shift in ((1.0, 0.0), (3.0, -2.0)):
        images = []
        for number in range(patients):
            found = [[11.0, 11.0, 30.0, 30.0]] if rng.random() < 0.8 else []
            logits = [rng.normal() + 1 + quality[number] for _ in found]
            for place in range(rng.integers(0, 3)):
                found.append([60.0, 60.0 + 5 * place, 80.0, 80.0 + 5 * place])
                logits.append(rng.normal())
            scores, labels = 1 / (1 + np.exp(-(scale * np.array(logits) + shift))), np.ones(len(found), int)
            box = np.array([[10.0, 10.0, 30.0, 30.0]])
            images.append(
                ImageResult(f"i{number}", f"p{number}", box, np.ones(1, int), np.reshape(found, (-1, 4)), labels, scores)
            )
        models.append(images)
    return models


def _share_below_5_percent(patients, trials):
    rng = np.random.default_rng(patients)
    studies = [two_detectors(rng, patients) for _ in range(trials)]
    return np.mean([paired_ap50([a], [b], 1, resamples=200).p_value <= 0.05 for a, b in studies])


def test_paired_ap50__false_positives_are_at_most_5_percent():
    assert _share_below_5_percent(8, 40) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("patients", [6, 10, 16])
def test_paired_ap50__false_positives_at_each_number_of_patients(patients):
    assert _share_below_5_percent(patients, 500) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)
