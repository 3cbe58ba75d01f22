"""What a histogram tells: CT in HU, CT that lost its rescale, and everything else, each with its reason."""

import numpy as np
import pytest
from meddino_data_curation.config import CurationConfig, HounsfieldConfig, SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.selection.hounsfield import recognise_hounsfield
from meddino_data_curation.sources.dicom_series import DicomCandidate
from meddino_data_curation.sources.discovery import discover

from meddino.core.errors import VolumeError
from meddino.data.corpus import Corpus
from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.formats.itk import read_volume_file
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_build import run_build

CONFIG = HounsfieldConfig()


def mri(seed: int) -> np.ndarray:
    """Rician background near 0 and tissues anywhere, with a smooth bias."""
    rng = np.random.default_rng(seed)
    hu = make_hu(seed, (8, 64, 72)).astype(float)
    signal = np.select([hu < -500, hu < -50, hu < 100], [0, 900, 420], 150)
    bias = 1 + 0.3 * np.linspace(-1, 1, 72)
    return np.hypot(signal * bias + rng.normal(0, 15, hu.shape), rng.normal(0, 15, hu.shape)).astype(np.int16)


def pet(seed: int) -> np.ndarray:
    """Counts: nearly nothing nearly everywhere, hot spots far above."""
    rng = np.random.default_rng(seed)
    inside = make_hu(seed, (8, 64, 72)) > -500
    values = rng.gamma(2.0, 300.0, inside.shape) * inside
    values[:, 30:34, 30:34] *= 40
    return values.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mri, "looks like MRI"),
        (pet, "looks like PET"),
        (lambda seed: pet(seed).astype(np.int32), "looks like PET"),
        (lambda seed: (make_hu(seed) > 0).astype(np.int16), "label map"),
        (lambda seed: np.digitize(make_hu(seed), [-800, -200, 0, 200]).astype(np.float64), "label map"),
        (lambda seed: ((make_hu(seed) + 1024) / 4095).astype(np.float32), "scaled to"),
        (lambda seed: np.clip((make_hu(seed) + 160.0) * 255 / 400, 0, 255).astype(np.float32), "8-bit"),
        (lambda seed: np.clip((make_hu(seed) + 160.0) * 255 / 400, 0, 255).astype(np.uint8), "8-bit"),
        (lambda seed: ((make_hu(seed) - 65.1) / 178.0).astype(np.float32), "normalised"),
        (lambda seed: np.full((4, 50, 50), -1000, np.int16), "every voxel is -1000"),
        (lambda seed: make_hu(seed).astype(np.int32) * 16, "not in HU"),
        (
            lambda seed: np.select([make_hu(seed) < -500, make_hu(seed) < 200], [-1000, 0], 1000),
            "label map: 3 different values",
        ),
        (lambda seed: np.digitize(make_hu(seed), [-800, -200, 0, 200]) * 100.5 - 200, "label map: 5 different values"),
        (lambda seed: (make_hu(seed) * 0.5).astype(np.float32), "air lies at about -5"),
        (lambda seed: np.rint(make_hu(seed) * 0.7).astype(np.int16), "air lies at about -7"),
    ],
)
def test_recognise_hounsfield__what_is_none_is_refused_with_what_it_is(make, words, seed):
    with pytest.raises(VolumeError, match=words):
        recognise_hounsfield(make(seed), CONFIG)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [(-1024, 3071), (-1000, 1000), (-160, 240), (-1350, 150), (-2048, 3071)])
def test_recognise_hounsfield__windows_of_ct_are_ct(window, seed):
    hu = make_hu(seed)
    if window[0] == -2048:
        hu = hu.copy()
        hu[:, :6] = -2048  # outside the scanner's circle
    assert recognise_hounsfield(np.clip(hu, *window), CONFIG).offset == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [1000, 1010, 1040, 1100])
def test_recognise_hounsfield__stored_values_with_another_offset_are_not_repaired_by_1024(offset, seed):
    stored = np.maximum(make_hu(seed).astype(np.int32) + offset, 0)
    with pytest.raises(VolumeError, match=r"an offset that is not certain|not in HU"):
        recognise_hounsfield(stored, CONFIG)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("low", [-1024, -1000])
def test_recognise_hounsfield__stored_values_with_padding_or_without_noise_are_repaired(low, seed):
    hu = np.maximum(make_hu(seed), low)
    hu[:, :8] = -1024  # outside the scanner's circle
    assert recognise_hounsfield(hu.astype(np.int32) + 1024, CONFIG).offset == -1024


def test_recognise_hounsfield__stored_values_without_air_are_refused():
    hu = np.maximum(make_hu(0), -300)
    with pytest.raises(VolumeError, match=r"an offset that is not certain|not in HU"):
        recognise_hounsfield(hu.astype(np.int32) + 1024, CONFIG)


def test_recognise_hounsfield__real_scans(shared_data):
    """All are taken as they are and clipped; what lost its rescale is repaired by the right number or not at all."""
    roots = [shared_data / "ct", shared_data / "segmentation/Dataset901_SarcomaCT/imagesTr"]
    sources = [SourceConfig(name=root.parent.name, path=root) for root in roots]
    limits = CurationConfig().limits
    seen = repaired = wrong = scaled = 0
    for item in discover(sources, Salt(b"for tests")).candidates:
        is_dicom = isinstance(item, DicomCandidate)
        hu = (
            read_dicom_volume(item.stack, limits) if is_dicom else read_volume_file(item.files[0], item.format, limits)
        ).voxels
        seen += 1
        for window in ((-32768, 32767), (-160, 240), (-500, 1000), (-800, 500), (-1350, 150)):
            assert recognise_hounsfield(np.clip(hu, *window), CONFIG).offset == 0, (item.source_path, window)
        repaired += verdict_offset(np.maximum(hu.astype(np.int32) + 1024, 0)) == -1024
        wrong += verdict_offset(np.maximum(hu.astype(np.int32) + 1000, 0)) is not None
        scaled += verdict_offset(hu * np.float32(0.5)) is None
    assert seen == 110
    assert repaired >= 0.75 * seen
    assert wrong <= 0.03 * seen
    assert scaled >= 0.85 * seen


def verdict_offset(voxels: np.ndarray) -> int | None:
    try:
        return recognise_hounsfield(voxels, CONFIG).offset
    except VolumeError:
        return None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_recognise_hounsfield__nan_and_infinity_are_counted(value):
    values = make_hu(0).astype(np.float32)
    values[1, 2, 3] = values[4, 5, 6] = value
    with pytest.raises(VolumeError, match="2 voxels are NaN or infinite"):
        recognise_hounsfield(values, CONFIG)


def test_build__stored_values_are_repaired_and_said_to_be(tmp_path, salt_file):
    hu = make_hu(0)
    write_volume(tmp_path / "in" / "a.nii.gz", (hu.astype(np.int32) + 1024).astype(np.uint16))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    assert {corpus.read(index).tobytes() for index in range(6)} == {plane.tobytes() for plane in hu}
    assert "1024 subtracted" in corpus.volumes.to_pylist()[0]["notes"]


def test_build__one_slice_volumes_by_config(tmp_path, salt_file):
    write_volume(tmp_path / "in" / "one.nii.gz", make_hu(0)[2:3])
    write_volume(tmp_path / "in" / "flat.nii.gz", make_hu(1)[2:3])
    write_volume(tmp_path / "in" / "two.nii.gz", make_hu(2)[2:4])
    assert run_build(tmp_path / "in", tmp_path / "all", salt_file, "workers=1") == 0
    assert len(Corpus(tmp_path / "all")) == 4
    more = ("workers=1", "slices.min_per_volume=2")
    assert run_build(tmp_path / "in", tmp_path / "some", salt_file, *more) == 0
    corpus = Corpus(tmp_path / "some")
    assert len(corpus) == 2
    reasons = [row["reason"] for row in corpus.volumes.to_pylist() if row["status"] == "rejected"]
    assert reasons == ["1 slices; slices.min_per_volume is 2"] * 2
