"""Slices of known shapes: what is body, what is refused and why, which are too near to the one before."""

import numpy as np
import pytest
from meddino_data_curation.config import InplaneConfig, SlicesConfig
from meddino_data_curation.selection.slice_choice import body_mask, refusal, size_refusal, slice_statistics, strided
from meddino_data_curation.selection.table_removal import without_table
from scipy import ndimage

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_build import run_build

DEFAULTS = SlicesConfig()


def scan(size: int = 512, radius: float = 0.6, noise: float = 10.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A body with two lungs on a curved table: HU, and where body and table are."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = np.hypot(x / radius, y / (0.75 * radius)) < 1
    hu = np.where(body, 40.0, -1000.0)
    for side in (-1, 1):
        hu[np.hypot((x - side * 0.45 * radius) / (0.25 * radius), y / (0.4 * radius)) < 1] = -850
    ring = np.hypot(x / 0.8, (y - 0.05) / 0.62)
    table = (ring > 1) & (ring < 1.025) & (y > 0.3)
    hu[table] = 120
    hu += np.random.default_rng(0).normal(0, noise, hu.shape)
    return np.rint(hu).astype(np.int16), body, table


def test_body_mask__body_with_its_lungs_and_without_the_table():
    hu, body, table = scan()
    mask = body_mask(hu)
    overlap = 2 * (mask & body).sum() / (mask.sum() + body.sum())
    assert overlap > 0.98
    assert (mask & table).sum() < 0.02 * table.sum()


def test_body_mask__two_legs_are_both_body():
    y, x = np.mgrid[-1 : 1 : 256 * 1j, -1 : 1 : 256 * 1j]
    legs = (np.hypot(x - 0.4, y) < 0.25) | (np.hypot(x + 0.4, y) < 0.2)
    hu = np.where(legs, 50, -1000).astype(np.int16)
    mask = body_mask(hu)
    assert 2 * (mask & legs).sum() / (mask.sum() + legs.sum()) > 0.97
    assert not body_mask(np.full((256, 256), -1000, dtype=np.int16)).any()


def test_without_table__the_table_is_air_and_no_pixel_of_the_body_is_touched():
    hu, body, table = scan()
    cleaned = without_table(hu, body_mask(hu))
    assert np.array_equal(cleaned[body], hu[body])
    far = table & ~ndimage.binary_dilation(body, iterations=12)
    assert (cleaned[far] == -1000).all()
    assert far.sum() > 0.9 * table.sum()


def _blank() -> np.ndarray:
    return np.random.default_rng(0).normal(-1000, 15, (512, 512)).astype(np.int16)


def _only_a_table() -> np.ndarray:
    hu, _, table = scan()
    return np.where(table, hu, _blank())


def _cut_off() -> np.ndarray:
    hu = scan()[0].copy()
    hu[220:] = -2000  # the file lacks the rest
    return hu


def _one_column_missing() -> np.ndarray:
    hu = scan()[0].copy()
    hu[:, :20] = -1024
    return hu


@pytest.mark.parametrize(
    ("hu", "reason"),
    [
        (lambda: scan()[0], ""),
        (lambda: scan(radius=0.25)[0], ""),  # an arm, 4 % of the picture
        (lambda: scan(radius=0.1)[0], "blank"),  # a finger: near-blank
        (_blank, "blank"),
        (_only_a_table, "blank"),
        (lambda: np.full((512, 512), -1024, dtype=np.int16), "constant"),
        (lambda: np.full((512, 512), 40, dtype=np.int16), "constant"),
        (_cut_off, "truncated"),
        (_one_column_missing, ""),
    ],
    ids=["body", "arm", "near-blank", "air", "table", "constant air", "constant tissue", "truncated", "narrow padding"],
)
def test_refusal__says_why(hu, reason):
    assert refusal(slice_statistics(hu())[0], DEFAULTS) == reason


def test_slice_statistics__percentiles_and_fraction_of_a_known_slice():
    hu, body, _ = scan(noise=0)
    statistics, sample = slice_statistics(hu)
    assert (statistics.p01, statistics.p50, statistics.p99) == (-1000, -1000, 120 if (hu == 120).mean() > 0.01 else 40)
    assert statistics.body_fraction == pytest.approx(body.mean(), rel=0.03)
    assert statistics.body_fraction == body_mask(hu).mean()
    assert np.array_equal(sample, np.sort(hu[::4, ::4], axis=None))
    assert statistics.padding_fraction == pytest.approx(abs(_flat_before(hu) - _flat_before(hu[::-1])) / 512, abs=0.02)


def _flat_before(hu: np.ndarray) -> int:
    return next(number for number, row in enumerate(hu) if (row != row[0]).any())


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "words"),
    [
        ((512, 512), (0.7, 0.7), ""),
        ((40, 2048), (2.0, 0.7), "slices.max_aspect is 4"),
        ((39, 512), (0.7, 0.7), "slices.min_size_px is 40"),
        ((512, 2049), (0.7, 0.7), "slices.max_size_px is 2048"),
        ((512, 512), (0.7, 2.2), "slices.max_pixel_aspect is 3"),
        ((512, 512), (2.2, 0.7), "slices.max_pixel_aspect is 3"),
        ((100, 500), (0.7, 0.7), "slices.max_aspect is 4"),
        ((100, 300), (0.7, 0.7), ""),
        ((250, 500), (2.0, 1.0), ""),  # square in mm
        ((512, 512), (0.0016, 0.0016), "pixels of 0.0016 x 0.0016 mm; slices.min_pixel_mm is 0.09"),  # metres
        ((512, 512), (0.098, 0.098), ""),
        ((64, 64), (50, 50), "pixels of 50 x 50 mm; slices.max_pixel_mm is 10"),
        ((64, 64), (5.5, 5.5), ""),
    ],
)
def test_size_refusal__limits_of_size_and_aspect(shape, spacing_mm, words):
    told = size_refusal(shape, spacing_mm, DEFAULTS)
    assert words in told if words else not told


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "words"),
    [
        ((512, 512), (0.97, 0.97), ""),
        ((2000, 2000), (9.0, 9.0), "slices of 40000 x 40000 px at inplane.spacing_mm 0.45; slices.max_size_px is 2048"),
        ((64, 64), (0.2, 0.2), "slices of 28 x 28 px at inplane.spacing_mm 0.45; slices.min_size_px is 40"),
    ],
)
def test_size_refusal__looks_at_the_grid_that_slices_are_resampled_to(shape, spacing_mm, words):
    assert size_refusal(shape, spacing_mm, DEFAULTS) == ""
    assert size_refusal(shape, spacing_mm, DEFAULTS, InplaneConfig(spacing_mm=0.45)) == words


def test_build__a_wrong_spacing_is_refused_before_memory_is_taken(tmp_path, salt_file):
    write_volume(tmp_path / "in" / "good.nii.gz", make_hu(0))
    write_volume(tmp_path / "in" / "metres.nii.gz", make_hu(1), spacing_mm=(0.005, 0.0045, 0.0045))
    write_volume(tmp_path / "in" / "coarse.nii.gz", make_hu(2, (6, 300, 300)), spacing_mm=(5.0, 9.0, 9.0))
    assert (
        run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "inplane.spacing_mm=0.45", "inplane.size_px=256")
        == 0
    )
    reasons = {row["status"]: row["reason"] for row in Corpus(tmp_path / "out").volumes.to_pylist()}
    assert reasons.keys() == {"accepted", "rejected"}
    words = sorted(row["reason"] for row in Corpus(tmp_path / "out").volumes.to_pylist() if row["reason"])
    assert "slices.min_pixel_mm" in words[0]
    assert "6000 x 6000 px at inplane.spacing_mm 0.45" in words[1]


def test_strided__neighbours_nearer_than_the_stride_are_left_out_in_mm_not_in_slices():
    thin = [0.625 * number for number in range(100)]
    assert sorted(strided(thin, 5.0)) == list(range(0, 100, 8))
    assert strided([5.0 * number for number in range(20)], 5.0) == set(range(20))  # thick slices all stay
    assert strided(thin, 0.0) == set(range(100))
    gap = [0.0, 1.0, 2.0, 12.0, 12.5, 17.0]
    assert strided(gap, 5.0) == {0, 3, 5}
    assert strided([number / 3 for number in range(31)], 1.0) == set(range(0, 31, 3))  # in spite of rounding


def test_build__stride_size_and_blank_slices_are_applied_and_counted(tmp_path, salt_file):
    hu = make_hu(0, (24, 64, 72))
    hu[3] = -1000
    hu[8:10] = np.random.default_rng(0).normal(-1000, 12, (2, 64, 72))
    write_volume(tmp_path / "in" / "thin.nii.gz", hu, spacing_mm=(1.0, 4.5, 4.5))
    write_volume(tmp_path / "in" / "narrow.nii.gz", make_hu(1, (6, 64, 30)))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "slices.z_stride_mm=4") == 0
    corpus = Corpus(tmp_path / "out")
    assert sorted(corpus.slices.column("z_index").to_pylist()) == [0, 4, 12, 16, 20]  # 8 is blank
    rows = {row["status"]: row for row in corpus.volumes.to_pylist()}
    assert "slices.min_size_px is 40" in rows["rejected"]["reason"]
    assert dict(rows["accepted"]["slices_left_out"]) == {"blank": 1, "closer than z_stride_mm": 18}
    assert dict(rows["rejected"]["slices_left_out"]) == {}


def test_build__table_is_removed_on_request(tmp_path, salt_file):
    hu, body, table = scan(256)
    write_volume(tmp_path / "in" / "a.nii.gz", np.repeat(hu[None], 2, axis=0), spacing_mm=(5.0, 1.5, 1.5))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "slices.remove_table=true") == 0
    slice_ = Corpus(tmp_path / "out").read(0)
    assert np.array_equal(slice_[body], hu[body])
    assert (slice_[table] == -1000).mean() > 0.9
