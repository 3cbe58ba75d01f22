"""AP as COCO measures it and FROC, of one or several runs, with intervals over patients.

pycocotools matches detections to boxes and gives the numbers. A resample of patients weighs images: the same matches,
cumulated with those weights, give the number of every resample without matching again.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from meddino.core.errors import ConfigError
from meddino_evaluation.detection.config import MetricsConfig
from meddino_evaluation.metrics.classification import mean_of_defined
from meddino_evaluation.metrics.statistics import SHARE, Interval, PairedResult, Resampling, exchanges, mean_and_std

COCO_IOUS = np.linspace(0.5, 0.95, 10)
_CELLS = 10**7
"""Resamples x detections that are cumulated at once."""
_RECALLS = np.linspace(0, 1, 101)
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ImageResult:
    """What is in an image and what was found.

    Attributes:
        name: Of the image.
        patient: Whose it is.
        boxes: [n, 4] left, top, right, lower edge, pixels of the stored image.
        labels: [n] class numbers from 1.
        found: [m, 4] detections.
        found_labels: [m] class numbers from 1.
        scores: [m] between 0 and 1.
    """

    name: str
    patient: str
    boxes: Numbers
    labels: NDArray[np.int64]
    found: Numbers
    found_labels: NDArray[np.int64]
    scores: Numbers


@dataclass(frozen=True)
class Matches:
    """Detections of one class in all images, the surest first, and which of them found a box.

    Attributes:
        image: [m] number of the image.
        scores: [m].
        hits: [thresholds, m] whether the detection found a box that no surer one had found.
        boxes: [images] boxes of the class in each image.
    """

    image: NDArray[np.int64]
    scores: Numbers
    hits: NDArray[np.bool_]
    boxes: NDArray[np.int64]


def match(results: Sequence[ImageResult], classes: int, ious: Sequence[float]) -> list[Matches]:
    """Match the detections of every class by pycocotools: greedily, the surest first, each to the free box it overlaps most.

    Args:
        results: One for each image.
        classes: How many.
        ious: Least overlaps for a hit, rising.
    """
    evaluated = _coco_eval(results, classes, ious)
    entries: list[Any] = evaluated.evalImgs
    found = []
    for number in range(classes):
        own = entries[number * len(results) : (number + 1) * len(results)]
        boxes = np.array([int((result.labels == number + 1).sum()) for result in results], dtype=np.int64)
        held = [(place, one) for place, one in enumerate(own) if one is not None and len(one["dtScores"])]
        image = np.concatenate([np.full(len(one["dtScores"]), place) for place, one in held] or [np.zeros(0, int)])
        scores = np.concatenate([np.asarray(one["dtScores"], dtype=np.float64) for _, one in held] or [np.zeros(0)])
        hits = np.concatenate([one["dtMatches"] > 0 for _, one in held] or [np.zeros((len(ious), 0), bool)], axis=1)
        order = np.argsort(-scores, kind="mergesort")
        found.append(Matches(image[order].astype(np.int64), scores[order], hits[:, order], boxes))
    return found


def coco_ap(results: Sequence[ImageResult], classes: int) -> NDArray[np.float64]:
    """Return pycocotools' average precision [thresholds 0.5 to 0.95, classes]; NaN for a class without boxes."""
    evaluated = _coco_eval(results, classes, COCO_IOUS)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluated.accumulate()
    precision: Numbers = evaluated.eval["precision"][:, :, :, 0, 0]  # thresholds, recalls, classes
    undefined = (precision == -1).all(1)
    return np.where(undefined, math.nan, precision.mean(1))


def _coco_eval(results: Sequence[ImageResult], classes: int, ious: Sequence[float] | Numbers) -> Any:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ConfigError(
            "detection is measured by pycocotools, which is not installed: pip install 'meddino[detection]'"
        ) from error

    def coco(rows: list[dict[str, Any]]) -> Any:
        made = COCO()
        images = [{"id": number} for number in range(1, len(results) + 1)]
        made.dataset = {"images": images, "categories": [{"id": one} for one in range(1, classes + 1)], "annotations": rows}
        made.createIndex()
        return made

    def rows(boxes_of: Callable[[ImageResult], tuple[Numbers, NDArray[np.int64], Sequence[float]]]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for number, result in enumerate(results, start=1):
            for (x1, y1, x2, y2), label, score in zip(*boxes_of(result), strict=True):
                box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
                row = {"id": len(made) + 1, "image_id": number, "category_id": int(label), "bbox": box, "area": area}
                made.append({**row, "iscrowd": 0, "score": float(score)})
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(rows(lambda one: (one.boxes, one.labels, [1.0] * len(one.labels))))
        found = coco(rows(lambda one: (one.found, one.found_labels, one.scores.tolist())))
        evaluated = COCOeval(truth, found, "bbox")
        evaluated.params.iouThrs, evaluated.params.maxDets = np.asarray(ious), [100]
        evaluated.params.areaRng, evaluated.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluated.evaluate()
    return evaluated


def weighted_ap(matches: Matches, threshold: int, weights: NDArray[np.int64]) -> Numbers:
    """Return COCO's average precision (101 recalls) of a class with images weighed.

    Args:
        matches: Of the class.
        threshold: Place of the overlap in `matches.hits`.
        weights: [resamples, images] how often each image counts.

    Returns:
        [resamples]; NaN where no box counts.
    """
    positives = weights @ matches.boxes
    own = weights[:, matches.image]
    hits = matches.hits[threshold]
    true, false = np.cumsum(own * hits, axis=1), np.cumsum(own * ~hits, axis=1)
    ap = np.full(len(weights), math.nan)
    for row in np.flatnonzero(positives):
        recall = true[row] / positives[row]
        precision = true[row] / (true[row] + false[row] + np.spacing(1))
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        place = np.searchsorted(recall, _RECALLS, side="left")
        ap[row] = (
            np.where(place < len(envelope), envelope[np.minimum(place, len(envelope) - 1)], 0.0).mean()
            if len(envelope)
            else 0.0
        )
    return ap


def froc(matches: Matches, threshold: int, rates: Sequence[float], weights: NDArray[np.int64]) -> Numbers:
    """Return the sensitivity at false positives an image, of a class, with images weighed.

    The greatest share of boxes that is found by all detections above some score, of which there are at most so many false
    ones an image. Detections of equal score come together.

    Returns:
        [resamples, rates]; NaN where no box counts.
    """
    positives, images = weights @ matches.boxes, weights.sum(1)
    own, hits = weights[:, matches.image], matches.hits[threshold]
    last = np.flatnonzero(np.append(matches.scores[1:] != matches.scores[:-1], True)) if len(hits) else np.zeros(0, int)
    true, false = np.cumsum(own * hits, axis=1)[:, last], np.cumsum(own * ~hits, axis=1)[:, last]
    true = np.concatenate([np.zeros((len(weights), 1)), true], axis=1)
    sensitivity = np.full((len(weights), len(rates)), math.nan)
    for place, rate in enumerate(rates):
        allowed = (false <= rate * images[:, None]).sum(1)  # false positives only rise
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitivity[:, place] = np.where(positives > 0, true[np.arange(len(weights)), allowed] / positives, math.nan)
    return sensitivity


def froc_curve(matches: Matches, threshold: int) -> tuple[Numbers, Numbers]:
    """Return false positives an image and sensitivity after each detection, the surest first."""
    hits = matches.hits[threshold]
    images, positives = max(1, len(matches.boxes)), max(1, int(matches.boxes.sum()))
    return np.cumsum(~hits) / images, np.cumsum(hits) / positives


def sensitivity_name(rate: float) -> str:
    """Return the name of a sensitivity in tables."""
    return f"sensitivity_at_{rate:g}"


def summarise(
    runs: Sequence[Sequence[ImageResult]], classes: Sequence[str], config: MetricsConfig, seed: int = 0
) -> dict[str, Any]:
    """Return every metric with mean and deviation over runs and an interval over patients.

    With several runs a resample draws patients and takes all their images in all runs. Means over classes go over those
    that have boxes. AP: pycocotools'. `sensitivity`: the mean over `froc_rates`.
    """
    ious = sorted({*np.round(COCO_IOUS, 12).tolist(), config.froc_iou})
    matched = [match(run, len(classes), ious) for run in runs]
    drawing = Resampling(
        sum(map(len, runs)),
        [one.patient for run in runs for one in run],
        level=config.level,
        resamples=config.resamples,
        seed=seed,
    )
    drawn, exact = _drawn(matched, drawing.weights(), ious, config), []
    for run, own in zip(runs, matched, strict=True):
        of_run = _values(own, np.ones((1, len(run)), dtype=np.int64), ious, config)
        numbers = {name: values[0] for name, values in of_run.items()}
        ap = coco_ap(run, len(classes))
        numbers["ap50"], numbers["ap50_95"] = ap[0], np.array([_mean(one) for one in ap.T])
        exact.append(numbers)
    metrics = {}
    for name in exact[0]:
        each = [_mean(numbers[name]) for numbers in exact]
        mean, deviation = mean_and_std(each)
        interval: Interval = drawing.interval(mean, drawn[name], SHARE)
        metrics[name] = {"mean": mean, "std": deviation, "low": interval.low, "high": interval.high, "runs": each}
    by_class = {
        label: {name: mean_and_std([numbers[name][place] for numbers in exact])[0] for name in exact[0]}
        | {"boxes": sum(int(own[place].boxes.sum()) for own in matched)}
        for place, label in enumerate(classes)
    }
    absent = [label for label, values in by_class.items() if not values["boxes"]]
    notes = [f"no test image has a box of class {', '.join(absent)}: it is in no mean"] if absent else []
    return {"metrics": metrics, "by_class": by_class, "notes": notes}


def paired_ap50(
    first: Sequence[Sequence[ImageResult]],
    second: Sequence[Sequence[ImageResult]],
    classes: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedResult:
    """Compare the AP50 of two models on the same images: bootstrap interval and permutation test, both over patients.

    The test exchanges the two models' detections in whole patients.

    Args:
        first: Runs of one model, each its images.
        second: Of the other: the same runs with the same images in the same order.
        classes: How many.
        level: Confidence level.
        resamples: How many; also the number of permutations where not all are tried.
        seed: Equal seeds draw equal resamples and permutations.
    """
    matched = [(match(a, classes, [0.5]), match(b, classes, [0.5])) for a, b in zip(first, second, strict=True)]
    patients = [one.patient for run in first for one in run]
    drawing = Resampling(len(patients), patients, level=level, resamples=resamples, seed=seed)
    owners = drawing.owners()
    exchanged, all_tried = exchanges(int(owners.max()) + 1, resamples, seed)
    ways = exchanged[:, owners]
    once = np.ones((1, len(patients)), dtype=np.int64)
    differences = [_ap50(matched, given, given * 0) - _ap50(matched, given * 0, given) for given in (once, drawing.weights())]
    permuted = _ap50(matched, (~ways).astype(np.int64), ways.astype(np.int64)) - _ap50(
        matched, ways.astype(np.int64), (~ways).astype(np.int64)
    )
    return drawing.paired(float(differences[0][0]), differences[1], permuted, all_tried)


def _ap50(
    matched: Sequence[tuple[list[Matches], list[Matches]]], first: NDArray[np.int64], second: NDArray[np.int64]
) -> Numbers:
    """Return the mean AP50 over runs and classes [ways] with so much weight on each image [ways, images] of either model."""
    start, by_run = 0, []
    for sides in matched:
        stop = start + len(sides[0][0].boxes)
        weights = np.concatenate([first[:, start:stop], second[:, start:stop]], axis=1)
        values = [weighted_ap(_side_by_side(a, b), 0, weights) for a, b in zip(*sides, strict=True)]
        by_run.append(mean_of_defined(np.stack(values)))
        start = stop
    return mean_of_defined(np.stack(by_run))


def _side_by_side(a: Matches, b: Matches) -> Matches:
    """Return the detections of two models as if the second had looked at images of its own.

    By rank, not by score: AP sees no scale, and two scales mixed would.
    """
    image = np.concatenate([a.image, b.image + len(a.boxes)])
    scores = np.concatenate([-stats.rankdata(-one.scores) for one in (a, b)])
    order = np.argsort(-scores, kind="mergesort")
    hits, boxes = np.concatenate([a.hits, b.hits], axis=1), np.concatenate([a.boxes, b.boxes])
    return Matches(image[order], scores[order], hits[:, order], boxes)


def _mean(values: Numbers) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _drawn(
    matched: Sequence[list[Matches]], weights: NDArray[np.int64], ious: Sequence[float], config: MetricsConfig
) -> dict[str, Numbers]:
    """Return each metric [resamples], the mean over runs and classes."""
    widest = max((len(one.image) for own in matched for one in own), default=0)
    rows = max(1, _CELLS // max(1, widest))
    parts = [_drawn_part(matched, weights[start : start + rows], ious, config) for start in range(0, len(weights), rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _drawn_part(
    matched: Sequence[list[Matches]], weights: NDArray[np.int64], ious: Sequence[float], config: MetricsConfig
) -> dict[str, Numbers]:
    start, by_run = 0, []
    for own in matched:
        images = len(own[0].boxes)
        values = _values(own, weights[:, start : start + images], ious, config)
        by_run.append({name: mean_of_defined(one.T) for name, one in values.items()})
        start += images
    return {name: mean_of_defined(np.stack([one[name] for one in by_run])) for name in by_run[0]}


def _values(
    matched: Sequence[Matches], weights: NDArray[np.int64], ious: Sequence[float], config: MetricsConfig
) -> dict[str, Numbers]:
    """Return each metric [resamples, classes]."""
    places = [int(np.argmin(np.abs(np.asarray(ious) - one))) for one in COCO_IOUS]
    ap = np.stack([np.stack([weighted_ap(one, place, weights) for one in matched], 1) for place in places])
    at = ious.index(config.froc_iou)
    found = np.stack([froc(one, at, config.froc_rates, weights) for one in matched], 1)  # resamples, classes, rates
    values = {"ap50": ap[0], "ap50_95": ap.mean(0), "sensitivity": found.mean(2)}
    return values | {sensitivity_name(rate): found[:, :, place] for place, rate in enumerate(config.froc_rates)}
