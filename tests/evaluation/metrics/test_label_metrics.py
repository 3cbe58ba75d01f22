import math

import numpy as np
import pytest
import torch
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.metrics.label_metrics import (
    AVERAGED,
    TITLES,
    case_means,
    mask_metrics,
    mean_over_cases,
    pooled_overlap,
    score_case,
)
from meddino_evaluation.metrics.tables import in_pixels, summarise

SPACING = (3.0, 1.0, 0.7)


def masks(seed: int, shape=(9, 14, 12)) -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    first = gaussian_filter(rng.normal(size=shape), 2) > 0.02
    return first, first ^ (gaussian_filter(rng.normal(size=shape), 1.5) > 0.12)


def slow_metrics(pred, ref, spacing):
    """Dice and IoU voxel by voxel; distances between all pairs of border voxels."""
    both = either = total = 0
    for a, b in zip(pred.ravel(), ref.ravel(), strict=True):
        both += a and b
        either += a or b
        total += int(a) + int(b)
    points = []
    for mask in (pred, ref):
        padded, found = np.pad(mask, 1), []
        for z, y, x in np.argwhere(mask):
            faces = [
                padded[z + 1 + dz, y + 1 + dy, x + 1 + dx] for dz, dy, dx in np.vstack([np.eye(3), -np.eye(3)]).astype(int)
            ]
            if not all(faces):
                found.append(np.array([z, y, x]) * spacing)
        points.append(np.array(found))
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    to_ref, to_pred = pairs.min(1), pairs.min(0)
    hd95 = max(np.percentile(to_ref, 95), np.percentile(to_pred, 95))
    return 2 * both / total, both / either, hd95, np.concatenate([to_ref, to_pred]).mean()


@pytest.mark.parametrize("seed", range(3))
def test_mask_metrics__equal_slow_loops(seed):
    pred, ref = masks(seed)
    found = mask_metrics(pred, ref, SPACING, 1.0)
    dice, iou, hd95, assd = slow_metrics(pred, ref, SPACING)
    assert found["dice"] == pytest.approx(dice)
    assert found["iou"] == pytest.approx(iou)
    assert found["hd95_mm"] == pytest.approx(hd95)
    assert found["assd_mm"] == pytest.approx(assd)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_mask_metrics__equal_monai(seed):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    pred, ref = masks(seed)
    found = mask_metrics(pred, ref, SPACING, 1.5)
    first, second = (torch.from_numpy(mask)[None, None] for mask in (pred, ref))
    options = {"include_background": True, "spacing": SPACING}
    assert found["hd95_mm"] == pytest.approx(
        float(compute_hausdorff_distance(first, second, percentile=95, **options)), rel=1e-5
    )
    assert found["assd_mm"] == pytest.approx(
        float(compute_average_surface_distance(first, second, symmetric=True, **options)), rel=1e-5
    )
    nsd = compute_surface_dice(first, second, [1.5], use_subvoxels=True, **options)
    assert found["nsd"] == pytest.approx(float(nsd), rel=1e-4)


def test_two_boxes__shifted_by_one_voxel_of_3_mm():
    ref = np.zeros((12, 20, 20), dtype=bool)
    ref[3:8, 5:15, 5:15] = True
    pred = np.roll(ref, 1, axis=0)
    found = mask_metrics(pred, ref, (3.0, 1.0, 1.0), 1.0)
    assert found["dice"] == pytest.approx(4 / 5)
    assert found["iou"] == pytest.approx(4 / 6)
    assert found["hd95_mm"] == pytest.approx(3.0)  # the two faces across the shift are more than 5 % of the border
    assert found["volume_ml_pred"] == pytest.approx(5 * 10 * 10 * 3 / 1000)
    # Border: 500 - 3 x 8 x 8 = 308 voxels a box. The face that sticks out (100 voxels) is 3 mm away. Of the other face the rim
    # lies on the other box's sides; its 8 x 8 inner voxels, one layer under that box's face, have 1, 2, 3, 4 mm to the sides
    # in rings of 28, 20, 12, 4, but never more than 3 mm to the face. Everything else is shared.
    assert found["assd_mm"] == pytest.approx((100 * 3 + 28 * 1 + 20 * 2 + 12 * 3 + 4 * 3) / 308)


def test_two_boxes__shifted_in_plane():
    ref = np.zeros((8, 24, 24), dtype=bool)
    ref[2:6, 4:16, 4:16] = True
    pred = np.roll(ref, 3, axis=2)
    near = mask_metrics(pred, ref, (3.0, 1.0, 1.0), 3.0)
    far = mask_metrics(pred, ref, (3.0, 1.0, 1.0), 2.9)
    assert near["dice"] == pytest.approx(9 / 12)
    assert near["hd95_mm"] == pytest.approx(3.0)
    assert near["nsd"] == pytest.approx(1.0)  # a distance equal to the tolerance is within
    assert 0.5 < far["nsd"] < 1.0


def test_surface_dice__area_of_a_box_by_hand():
    from meddino_evaluation.metrics.surfaces import surface_dice

    ref = np.zeros((40, 40, 40), dtype=bool)
    ref[5:35, 5:35, 5:35] = True
    pred = np.zeros_like(ref)
    pred[5:35, 5:35, 5:30] = True  # one face lies 5 voxels inside
    found = surface_dice(pred, ref, (1.0, 1.0, 1.0), 1.0)
    # Of 6 faces of 30 x 30 and of 5 smaller ones most agree; the face at 30 and the strip between 30 and 35 do not.
    area_ref, area_pred = 6 * 900, 2 * 900 + 4 * 30 * 25
    apart = 900 + 4 * 30 * 4 + 900 - 4 * 30 * 1  # the far face, its strip beyond 1 mm, and the new face but its rim
    assert found == pytest.approx(1 - apart / (area_ref + area_pred), abs=0.02)


@pytest.mark.parametrize(
    ("pred", "ref", "wanted"),
    [
        (False, False, {"dice": math.nan, "nsd": math.nan, "hd95_mm": math.nan, "volume_ml_ref": 0.0}),
        (True, False, {"dice": 0.0, "iou": 0.0, "nsd": 0.0, "hd95_mm": math.nan, "volume_ml_pred": 0.064}),
        (False, True, {"dice": 0.0, "iou": 0.0, "nsd": 0.0, "assd_mm": math.nan, "volume_ml_ref": 0.064}),
    ],
)
def test_mask_metrics__the_rule_for_empty_labels(pred, ref, wanted):
    found = mask_metrics(np.full((4, 4, 4), pred), np.full((4, 4, 4), ref), (1.0, 1.0, 1.0), 1.0)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, nan_ok=True), key


def test_score_case__ignored_voxels_count_for_nothing():
    scheme = LabelScheme(("organ",), ((1,),), ignore=9)
    ref = np.zeros((2, 4, 4), dtype=np.int32)
    ref[:, :2], ref[:, 3] = 1, -1
    pred = np.zeros_like(ref)
    pred[:, :2], pred[:, 3] = 1, 1
    assert score_case("a", pred, ref, scheme, (1.0, 1.0, 1.0), 1.0)[0].dice == 1.0


def test_score_case__regions_overlap():
    scheme = LabelScheme(("whole", "core"), ((1, 2), (2,)), region_values=(1, 2))
    ref = np.array([[[1, 1, 2, 0]]], dtype=np.int32)
    pred = np.array([[[1, 2, 2, 0]]], dtype=np.int32)
    whole, core = score_case("a", pred, ref, scheme, (1.0, 1.0, 1.0), 1.0, surface=False)
    assert whole.dice == 1.0
    assert core.dice == pytest.approx(2 / 3)


def test_means__labels_of_a_case_first_then_cases():
    rows = [
        {"case": "a", "dice": 1.0},
        {"case": "a", "dice": math.nan},
        {"case": "b", "dice": 0.0},
        {"case": "b", "dice": 0.5},
        {"case": "c", "dice": math.nan},
    ]
    assert case_means(rows, "dice") == {"a": 1.0, "b": 0.25}
    assert mean_over_cases(rows, "dice") == (0.625, 2)


def test_volumes__difference_error_and_pooled_figures_by_hand():
    scheme = LabelScheme(("a",), ((1,),))
    rows = []
    # |prediction|, |reference|, overlap in voxels of 2 ml: a large good case and a small bad one.
    for case, (pred_size, ref_size, both) in {"large": (90, 100, 80), "small": (12, 8, 2), "none": (0, 0, 0)}.items():
        pred, ref = np.zeros((1, 10, 20), dtype=np.int32), np.zeros((1, 10, 20), dtype=np.int32)
        ref.flat[:ref_size] = 1
        pred.flat[ref_size - both : ref_size - both + pred_size] = 1
        (row,) = score_case(case, pred, ref, scheme, (20.0, 10.0, 10.0), 1.0, surface=False)
        rows.append({**row.values(), "seed": 0, "site": "", "patient": case})
    assert [row["volume_difference_ml"] for row in rows[:2]] == [-20.0, 8.0]
    assert math.isnan(rows[2]["volume_difference_ml"])
    summary = summarise(rows, 100)
    assert summary["volume_difference_ml"]["mean"] == pytest.approx(-6.0)
    assert summary["volume_error_ml"]["mean"] == pytest.approx(14.0)
    assert summary["dice"]["mean"] == pytest.approx((160 / 190 + 4 / 20) / 2)
    assert summary["by_label"]["a"]["pooled"]["dice"]["mean"] == pytest.approx(2 * 82 / (102 + 108))
    assert summary["by_label"]["a"]["pooled"]["iou"]["mean"] == pytest.approx(82 / (102 + 108 - 82))
    assert math.isnan(pooled_overlap(rows[2:])["dice"])


@pytest.mark.parametrize("seed", range(3))
def test_score_case__pictures_equal_monai_and_surface_distance_in_two_dimensions(seed):
    import surface_distance
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    pred, ref = (mask[4] for mask in masks(seed, (9, 40, 36)))
    scheme, values = LabelScheme(("a",), ((1,),)), (pred[None].astype(np.int32), ref[None].astype(np.int32))
    row = score_case("c", *values, scheme, (1.0, 1.0, 1.0), 2.0, flat=True)[0]
    hot = [torch.from_numpy(np.stack([~mask, mask]))[None].float() for mask in (pred, ref)]
    nsd = compute_surface_dice(*hot, class_thresholds=[2.0], spacing=(1.0, 1.0), use_subvoxels=True)
    assert row.nsd == pytest.approx(float(nsd), abs=1e-6)
    theirs = surface_distance.compute_surface_distances(ref, pred, spacing_mm=(1.0, 1.0))
    assert row.nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0), abs=1e-6)
    assert row.hd95_mm == pytest.approx(float(compute_hausdorff_distance(*hot, percentile=95)), abs=1e-5)
    segmentation = pytest.importorskip("torchmetrics.functional.segmentation")
    counts = [torch.from_numpy(value).long() for value in values]
    settings = {"num_classes": 2, "include_background": False, "input_format": "index"}
    assert row.dice == pytest.approx(float(segmentation.dice_score(*counts, average="macro", **settings)), abs=1e-6)
    assert row.iou == pytest.approx(float(segmentation.mean_iou(*counts, **settings)), abs=1e-6)


def test_in_pixels__renames_and_scales_areas_alone():
    row = {"case": "c", "dice": 0.5, "hd95_mm": 3.0, "volume_ml_pred": 0.25}
    assert in_pixels(row) == {"case": "c", "dice": 0.5, "hd95_px": 3.0, "area_px_pred": 250.0}
    summary = {"volume_error_ml": {"mean": 0.1, "std": None, "by_seed": [0.1]}, "by_label": {"a": {"assd_mm": {"mean": 2.0}}}}
    assert in_pixels(summary) == {
        "area_error_px": {"mean": 100.0, "std": None, "by_seed": [100.0]},
        "by_label": {"a": {"assd_px": {"mean": 2.0}}},
    }


def test_averaged__every_title_has_its_span():
    assert list(AVERAGED) == [name for name in TITLES if not name.endswith("_px")]
    assert AVERAGED["dice"] == (0.0, 1.0)
    assert AVERAGED["hd95_mm"] == AVERAGED["volume_error_ml"] == (0.0, math.inf)
    assert AVERAGED["volume_difference_ml"] == (-math.inf, math.inf)
