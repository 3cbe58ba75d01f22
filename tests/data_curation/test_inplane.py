"""The pixel grid of slices: the scanner's own by default, the paper's by its preset, without folded frequencies."""

import numpy as np
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.config import CurationConfig, InplaneConfig
from meddino_data_curation.selection.inplane import resample_slice

from meddino.core.config import load_config
from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume

PAPER = load_config(CurationConfig, ["default", "ct3m_paper"], kind="data_curation")


def wave(size: int, spacing_mm: float, period_mm: float, amplitude: float = 500.0) -> np.ndarray:
    """A cosine over the columns, of a known period."""
    x_mm = (np.arange(size) + 0.5) * spacing_mm
    return np.rint(np.tile(amplitude * np.cos(2 * np.pi * x_mm / period_mm), (size, 1))).astype(np.int16)


def amplitude_of(hu: np.ndarray, spacing_mm: float, period_mm: float) -> float:
    """How much of a cosine of that period there is in the middle rows' middle part."""
    middle = hu[hu.shape[0] // 2, hu.shape[1] // 8 : -hu.shape[1] // 8].astype(float)
    x_mm = (np.arange(hu.shape[1])[hu.shape[1] // 8 : -hu.shape[1] // 8] + 0.5) * spacing_mm
    window = np.hanning(len(middle))
    return float(2 * abs((window * middle * np.exp(-2j * np.pi * x_mm / period_mm)).sum()) / window.sum())


def test_default__keeps_the_scanners_grid_and_every_bit():
    hu = make_hu(3)[2]
    same, spacing = resample_slice(hu, (0.7, 0.9), InplaneConfig())
    assert same is hu
    assert spacing == (0.7, 0.9)
    config = load_config(CurationConfig, ["default"], kind="data_curation")
    assert (config.inplane.spacing_mm, config.inplane.size_px) == (None, None)


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "expected"),
    [
        ((512, 512), (0.9, 0.9), (1.8, 1.8)),  # 1024 px of 0.45 mm, then 256 of 1.8
        ((512, 512), (0.45, 0.45), (0.9, 0.9)),
        ((400, 512), (0.8, 0.8), (1.25, 1.6)),  # not square: squeezed to a square
        ((128, 128), (0.7, 0.7), (0.35, 0.35)),  # a small field is enlarged
    ],
)
def test_paper_preset__gives_256_squares_over_the_same_field(shape, spacing_mm, expected):
    hu = np.full(shape, 40, dtype=np.int16)
    resized, spacing = resample_slice(hu, spacing_mm, PAPER.inplane)
    assert resized.shape == (256, 256)
    assert resized.dtype == np.int16
    assert (resized == 40).all()
    assert spacing == pytest.approx(expected, rel=0.003)
    assert np.allclose(np.array(spacing) * 256, np.array(shape) * spacing_mm)


def test_spacing__is_reached_to_a_pixel():
    resized, spacing = resample_slice(np.zeros((512, 400), dtype=np.int16), (0.7, 0.7), InplaneConfig(spacing_mm=0.45))
    assert resized.shape == (796, 622)
    assert spacing == pytest.approx((0.45, 0.45), rel=0.001)


@pytest.mark.parametrize("size_px", [256, 200, 128])
def test_shrinking__a_frequency_beyond_the_new_grid_does_not_fold_into_it(size_px):
    size, spacing = 512, 0.8
    new_spacing = spacing * size / size_px
    period = 1.25 * new_spacing  # 0.8 cycles a new pixel: beyond 0.5, it would come back as 0.2
    folded = 1 / (1 / new_spacing - 1 / period)
    hu = wave(size, spacing, period)
    resized, _ = resample_slice(hu, (spacing, spacing), InplaneConfig(size_px=size_px))
    bare = hu[:: size // size_px, :: size // size_px][:size_px, :size_px]
    if size % size_px == 0:
        assert amplitude_of(bare, new_spacing, folded) > 450  # what plain sampling would show
    assert amplitude_of(resized, new_spacing, folded) < 50


def test_shrinking__a_frequency_well_inside_the_new_grid_stays():
    period = 16 * 1.6
    resized, _ = resample_slice(wave(512, 0.8, period), (0.8, 0.8), InplaneConfig(size_px=256))
    assert amplitude_of(resized, 1.6, period) > 480


def test_resampling__hu_stay_hu_at_the_ends_of_int16():
    hu = np.zeros((64, 64), dtype=np.int16)
    hu[:32], hu[32:] = -32768, 32767
    resized, _ = resample_slice(hu, (1.0, 1.0), InplaneConfig(size_px=96))
    assert (resized.min(), resized.max()) == (-32768, 32767)


def test_build__paper_preset_end_to_end(tmp_path, salt_file):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0), spacing_mm=(5.0, 4.5, 4.5))
    command = ["build", str(tmp_path / "in"), "--config", "ct3m_paper", "--out", str(tmp_path / "out"), "workers=1"]
    assert main([*command, f"privacy.salt_file={salt_file}"]) == 0
    corpus = Corpus(tmp_path / "out")
    assert {corpus.read(index).shape for index in range(len(corpus))} == {(256, 256)}
    assert np.allclose(corpus.spacing_mm, (64 * 4.5 / 256, 72 * 4.5 / 256))
    assert corpus.info["config"]["inplane"] == {"size_px": 256, "spacing_mm": 0.45}
