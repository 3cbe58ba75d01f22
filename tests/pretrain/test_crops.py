"""Boxes, cutting and resizing of crops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from meddino_pretrain.data.crops import CropBox, _fitting_box, cut_crop, draw_boxes, repeated_box
from meddino_pretrain.data.views import View, ViewSizes, ViewSpec
from meddino_pretrain.methods.dinov3.config import CropsConfig, CropSizes
from meddino_pretrain.methods.dinov3.views import crop_views
from pydantic import ValidationError
from scipy import stats

from meddino.core.errors import ConfigError

SPEC = crop_views(CropsConfig())


def all_boxes(spec: ViewSpec, *arguments) -> list[CropBox]:
    return [box for boxes in draw_boxes(spec, *arguments).values() for box in boxes]


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, as PIL has it."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def slow_resize_rows(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis: each new row is a weighted mean of the rows under the (widened) kernel."""
    scale = image.shape[0] / size
    wide = max(scale, 1.0)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale
        weights = np.array([cubic((j + 0.5 - centre) / wide) for j in range(image.shape[0])])
        rows.append((weights[:, None] * image).sum(axis=0) / weights.sum())
    return np.array(rows)


def slow_crop(hu: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    cut = hu[box.top : box.top + box.height, box.left : box.left + box.width].astype(float)
    resized = slow_resize_rows(slow_resize_rows(cut, size).T, size).T.clip(cut.min(), cut.max())
    return resized[:, ::-1] if box.flipped else resized


@pytest.mark.parametrize(
    "box", [CropBox(3, 5, 40, 31, False), CropBox(0, 0, 60, 50, True), CropBox(20, 7, 9, 12, False), CropBox(4, 4, 1, 1, True)]
)
def test_cut_crop__equals_a_slow_loop(box):
    hu = np.random.default_rng(0).integers(-1000, 2000, (60, 50)).astype(np.int16)
    crop = cut_crop(hu, box, 16)
    assert crop.dtype == torch.int16
    assert np.abs(crop.numpy() - slow_crop(hu, box, 16)).max() <= 0.51  # rounding


def test_cut_crop__never_leaves_the_range_of_its_box():
    hu = np.full((64, 64), -1000, dtype=np.int16)
    hu[:, 32:] = 3000
    crop = cut_crop(hu, CropBox(0, 20, 24, 24, False), 96)
    assert crop.min() == -1000 and crop.max() == 3000  # bicubic alone would give about -1300 and 3300


def test_cut_crop__does_not_change_the_slice():
    hu = np.arange(400, dtype=np.int16).reshape(20, 20)
    before = hu.copy()
    cut_crop(hu, CropBox(0, 0, 20, 20, True), 20)
    assert np.array_equal(hu, before)


@pytest.mark.parametrize("flipped", [False, True])
def test_cut_crop__gram_crop_shrunk_is_the_global_crop(flipped):
    y, x = np.mgrid[0:200, 0:160]
    hu = (400 * np.sin(y / 15) * np.cos(x / 20) + x).astype(np.int16)
    box = CropBox(13, 22, 120, 101, flipped)
    small, large = cut_crop(hu, box, 48), cut_crop(hu, box, 96)
    shrunk = F.avg_pool2d(large.float()[None, None], 2)[0, 0]
    assert (shrunk - small).abs().mean() < 2  # a flip or a shift of one pixel gives over 10
    assert (shrunk.flip(-1) - small).abs().mean() > 10


@pytest.mark.parametrize("shape", [(400, 100), (100, 400)])
def test_draw_boxes__elongated_slices_share_ratio_and_place_are_drawn(shape):
    # Of half the slice no allowed shape fits: the largest box of a log-uniform shape, anywhere along the slice.
    spec = crop_views(CropsConfig(global_scale=(0.5, 1.0)))
    boxes = np.array([all_boxes(spec, 1, n, shape, (1.0, 1.0))[:2] for n in range(1000)], dtype=float).reshape(-1, 5)
    top, left, height, width = boxes.T[:4]
    assert ((top + height <= shape[0]) & (left + width <= shape[1])).all()
    assert (np.maximum(width == shape[1], height == shape[0])).all()
    low, high = np.log(spec.aspect_ratio)
    assert stats.kstest((np.log(width / height) - low) / (high - low), "uniform").statistic < 0.05
    room = (shape[0] - height + 1) if shape[0] > shape[1] else (shape[1] - width + 1)
    assert stats.kstest((top + left + 0.5) / room, "uniform").statistic < 0.05
    assert len(np.unique(boxes[:, :4], axis=0)) > 1000


def test_draw_boxes__elongated_slices_area_is_uniform_over_what_fits():
    draws = np.random.default_rng(0).random((3000, 3))
    ratio, rows, cols = 0.8, 800, 200
    boxes = np.array([_fitting_box(tuple(row), (0.1, 0.9), ratio, rows, cols) for row in draws], dtype=float)
    shares = boxes[:, 2] * boxes[:, 3] / (rows * cols)
    largest = cols * cols / ratio / (rows * cols)
    assert stats.kstest((shares - 0.1) / (largest - 0.1), "uniform").statistic < 0.05
    assert np.abs(boxes[:, 3] / boxes[:, 2] - ratio).max() < 0.02


def test_draw_boxes__area_shape_and_flip_follow_the_config():
    rows, cols = 400, 300
    boxes = np.array([all_boxes(SPEC, 1, n, (rows, cols), (1.0, 1.0)) for n in range(600)], dtype=float)
    assert boxes.shape == (600, 10, 5)
    top, left, height, width, flip = boxes.transpose(2, 0, 1)
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= rows and (left + width).max() <= cols
    area, ratio = height * width / (rows * cols), width / height
    local = area[:, 2:]
    assert 0.049 < local.min() < 0.055 and 0.31 < local.max() < 0.325
    assert local.mean() == pytest.approx((0.05 + 0.32) / 2, abs=0.005)  # uniform: nearly every first try fits
    assert local.std() == pytest.approx((0.32 - 0.05) / math.sqrt(12), abs=0.005)
    assert area[:, :2].min() > 0.31 and area[:, :2].max() <= 1.0
    log_ratio = np.log(ratio[:, 2:])
    assert np.abs(log_ratio).max() < math.log(4 / 3) + 0.03
    assert log_ratio.mean() == pytest.approx(0, abs=0.01)
    assert flip.mean() == pytest.approx(0.5, abs=0.03)


def test_draw_boxes__shape_is_that_of_millimetres():
    boxes = np.array([all_boxes(SPEC, 1, n, (200, 600), (1.5, 0.5)) for n in range(200)], dtype=float)
    log_ratio = np.log((boxes[:, 2:, 3] * 0.5) / (boxes[:, 2:, 2] * 1.5))
    assert np.abs(log_ratio).max() < math.log(4 / 3) + 0.03
    assert log_ratio.mean() == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize("shape", [(73, 47), (1, 1), (3, 500), (1024, 1024), (500, 2)])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (5.0, 0.4)])
def test_draw_boxes__stay_inside_any_slice(shape, spacing_mm):
    for number in range(20):
        for box in all_boxes(SPEC, 2, number, shape, spacing_mm):
            assert box.height >= 1 and box.width >= 1
            assert 0 <= box.top <= shape[0] - box.height and 0 <= box.left <= shape[1] - box.width


def test_draw_boxes__a_view_does_not_depend_on_how_many_follow():
    few_spec, many_spec = (crop_views(CropsConfig(num_local=count)) for count in (2, 6))
    few, many = (all_boxes(spec, 4, 17, (90, 90), (1.0, 1.0)) for spec in (few_spec, many_spec))
    assert many[:4] == few and len(many) == 8
    assert few != all_boxes(few_spec, 4, 18, (90, 90), (1.0, 1.0))
    assert few != all_boxes(few_spec, 5, 17, (90, 90), (1.0, 1.0))


def test_draw_boxes__a_kind_may_take_anothers_boxes():
    views = {"one": View(2, (0.3, 0.5)), "again": View(2, boxes_of="one"), "other": View(1, (0.1, 0.2))}
    spec = ViewSpec(views, (ViewSizes({"one": 32, "again": 64, "other": 16}),))
    found = draw_boxes(spec, 0, 3, (90, 90), (1.0, 1.0))
    assert found["again"] == found["one"] != found["other"] and [len(boxes) for boxes in found.values()] == [2, 2, 1]
    assert [spec.rows_of(name) for name in views] == [slice(0, 2), slice(0, 2), slice(2, 3)]


def test_sizes_for_step__follow_their_weights():
    weights = (0.3, 0.3, 0.3, 0.05, 0.05)
    sizes = tuple(ViewSizes({"one": 32 * (i + 1)}, weight) for i, weight in enumerate(weights))
    spec = ViewSpec({"one": View(1)}, sizes)
    drawn = [spec.sizes_for_step(9, step) for step in range(2000)]
    for size, weight in zip(sizes, weights, strict=True):
        assert drawn.count(size.px) / 2000 == pytest.approx(weight, abs=0.03)
    assert drawn[1234] == spec.sizes_for_step(9, 1234) and spec.main_px == (32, 64, 96, 128, 160)


def test_check_sides__names_every_size_that_does_not_divide():
    spec = ViewSpec({"one": View(1), "two": View(1)}, (ViewSizes({"one": 32, "two": 30}), ViewSizes({"one": 20, "two": 40})))
    with pytest.raises(ConfigError, match=r"stages\.first: two=30, stages\.first: one=20"):
        spec.check_sides(8, "stages.first")
    spec.check_sides(2, "stages.first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_scale": (0.9, 0.5)}, r"global_scale \[0.9, 0.5\] must ascend"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        (
            {"sizes": (CropSizes(global_px=32, local_px=16, gram_px=64), CropSizes(global_px=32, local_px=16))},
            "gram_px must be set for all sizes or for none",
        ),
        ({"sizes": ()}, "at least 1 item"),
    ],
)
def test_crops_config__refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValidationError, match=message):
        CropsConfig(**change)


def test_repeated_box__keeps_the_wanted_share_of_both_sides_and_belongs_to_the_sample():
    boxes = [repeated_box((0.85, 0.95), 3, number, (200, 100)) for number in range(200)]
    for rows, cols in boxes:
        assert rows.start >= 0 and rows.stop <= 200 and cols.start >= 0 and cols.stop <= 100
        assert 170 <= rows.stop - rows.start <= 190 and abs((rows.stop - rows.start) / 2 - (cols.stop - cols.start)) <= 1
    assert boxes[7] == repeated_box((0.85, 0.95), 3, 7, (200, 100)) and len(set(map(str, boxes))) > 150
