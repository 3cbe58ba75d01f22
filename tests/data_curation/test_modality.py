"""MR and pictures in a corpus: recognised, refused, chosen slice by slice, and stored as they are."""

from pathlib import Path

import numpy as np
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.config import HounsfieldConfig, SlicesConfig
from meddino_data_curation.selection.modality import PICTURE, recognise
from meddino_data_curation.selection.slice_choice import refusal, slice_statistics
from PIL import Image, ImageDraw

from meddino.checkpoints.export.comparison import check_slices
from meddino.core.errors import VolumeError
from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume

HU = HounsfieldConfig()


def make_mr(seed: int, shape: tuple[int, int, int] = (5, 64, 72)) -> np.ndarray:
    """float32 [Z, Y, X]: dark air with Rician noise, a bright rim of fat, tissues, in arbitrary units."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    radius = np.hypot(x / rng.uniform(0.7, 0.85), y / rng.uniform(0.6, 0.75))
    signal = np.where(radius < 1, 1900.0, 0.0)
    signal[radius < 0.85] = 500 + 40 * rng.normal()
    for _ in range(12):
        cy, cx = rng.uniform(-0.5, 0.5, 2)
        signal[np.hypot(x - cx, y - cy) < rng.uniform(0.05, 0.2)] = rng.uniform(200, 1500)
    noise = rng.normal(0, 12, (2, *shape))
    return np.hypot(signal + noise[0], noise[1]).astype(np.float32)


def picture(seed: int, colour: bool = True, size: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    disc = (np.hypot(x, y) < 0.8)[..., None] * np.array([200, 90, 40]) + rng.normal(0, 12, (size, size, 3))
    disc[np.hypot(x - rng.uniform(-0.4, 0.4), y) < 0.2] += 60
    rgb = disc.clip(0, 255).astype(np.uint8)
    return rgb if colour else rgb[..., 0]


def test_recognise__mr_keeps_its_volumes_percentiles():
    voxels = make_mr(0)
    found = recognise(voxels, "mr", "", HU)
    assert found.modality == "mr" and found.value_range == pytest.approx(np.percentile(voxels, (0.5, 99.5)))
    assert found.stored(voxels[0]).dtype == np.float32 and np.array_equal(found.stored(voxels[0]), voxels[0])
    whole = recognise(voxels.astype(np.uint16), "auto", "MR", HU)
    assert whole.modality == "mr" and whole.stored(voxels[0].astype(np.uint16)).dtype == np.uint16


def test_recognise__pictures_keep_their_types_range():
    for values, top in ((picture(0)[None], 255), (picture(0, colour=False).astype(np.uint16)[None] * 257, 65535)):
        found = recognise(values, "auto", PICTURE, HU)
        assert found.modality == "image" and found.value_range == (0, top)
        assert np.array_equal(found.stored(values[0]), values[0])


def test_recognise__auto_takes_what_says_nothing_for_ct_by_its_histogram():
    assert recognise(make_hu(0), "auto", "", HU).modality == "ct"
    with pytest.raises(VolumeError, match="not in HU"):
        recognise(make_mr(0) + 5, "auto", "", HU)


def test_recognise__ct_beyond_int16_is_told():
    hu = make_hu(0).astype(np.int32)
    assert recognise(hu, "auto", "", HU).note == ""
    hu[0, :3, :3] = 40000
    found = recognise(hu, "auto", "", HU)
    assert found.note == f"values of {hu.min()} to 40000 HU, stored as int16, clipped"
    assert found.stored(hu[0])[0, 0] == 32767


@pytest.mark.parametrize(("off", "note"), [(0.0, ""), (1e-4, ""), (0.4, "values with fractions of HU rounded to whole HU")])
def test_recognise__ct_of_real_numbers_is_rounded_and_told(off, note):
    hu = make_hu(0)
    found = recognise(hu.astype(np.float32) + np.float32(off), "auto", "", HU)
    assert found.note == note
    assert np.array_equal(found.stored(hu[0] + off), hu[0])


@pytest.mark.parametrize(
    ("voxels", "wanted", "code", "words"),
    [
        (make_hu(0), "mr", "", "look like CT"),
        (make_hu(0), "mr", "CT", r"says modality mr.*CT in Hounsfield"),
        (make_mr(0), "ct", "MR", r"says modality ct.*MR in arbitrary"),
        (make_hu(0), "image", "CT", r"says modality image.*CT"),
        (make_mr(0), "auto", "PT", "modality is PT"),
        (np.full((4, 40, 40), 7.0), "mr", "", "every voxel is 7"),
        ((make_mr(0) > 300).astype(np.uint8), "mr", "", "binary mask: 2"),
        ((make_mr(0) // 200).astype(np.int16), "mr", "", "label map"),
        (np.where(make_mr(0) > 300, np.nan, make_mr(0)), "mr", "", "NaN"),
        (np.full((1, 40, 40), 9, np.uint8), "image", PICTURE, "blank picture"),
        (make_mr(0)[:1], "image", PICTURE, "float32; a picture has 8 or 16 bits"),
    ],
)
def test_recognise__refuses_with_the_reason(voxels, wanted, code, words):
    with pytest.raises(VolumeError, match=words):
        recognise(voxels, wanted, code, HU)


def test_slice_statistics__mr_by_the_share_that_is_brighter_than_air():
    voxels = make_mr(1)
    span = recognise(voxels, "mr", "", HU).value_range
    statistics, _ = slice_statistics(voxels[2], "mr", span)
    assert 0.3 < statistics.body_fraction < 0.75 and refusal(statistics, SlicesConfig(), span) == ""
    air = np.abs(np.random.default_rng(0).normal(0, 12, (64, 72))).astype(np.float32)
    assert refusal(slice_statistics(air * 3, "mr", span)[0], SlicesConfig(), span) == "blank"
    assert refusal(slice_statistics(np.zeros((64, 72), np.float32), "mr", span)[0], SlicesConfig(), span) == "constant"


def test_slice_statistics__pictures_of_writing_alone_are_blank():
    page = Image.new("L", (320, 320), 255)
    for line in range(12):
        ImageDraw.Draw(page).text((10, 10 + 25 * line), "patient name, date of birth, ward", fill=0)
    page = np.asarray(page)
    assert refusal(slice_statistics(page, "image", (0, 255))[0], SlicesConfig(), (0.0, 255.0)) in ("blank", "constant")
    for colour in (True, False):
        statistics, _ = slice_statistics(picture(2, colour), "image", (0, 255))
        assert 0.3 < statistics.body_fraction < 0.8 and refusal(statistics, SlicesConfig(), (0.0, 255.0)) == ""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, salt_file) -> Path:
    """A corpus of two CT and two MR volumes and four pictures, with one of each that has to be refused."""
    root = tmp_path_factory.mktemp("mixed")
    for number in range(2):
        write_volume(root / "ct" / f"c{number}.nii.gz", make_hu(number))
        write_volume(root / "mr" / f"m{number}.nii.gz", make_mr(number))
    write_volume(root / "ct" / "is_mr.nii.gz", make_mr(7))
    write_volume(root / "mr" / "is_ct.nii.gz", make_hu(7))
    (root / "pictures").mkdir()
    for number in range(4):
        Image.fromarray(picture(number, colour=number < 3)).save(root / "pictures" / f"p{number}.png")
    Image.fromarray(np.full((96, 96), 3, np.uint8)).save(root / "pictures" / "blank.png")
    (root / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    sources = "".join(f"  - {{name: {name}, path: {root / name}, modality: {kind}}}\n" for name, kind in KINDS.items())
    (root / "mixed.yaml").write_text(f"sources:\n{sources}")
    out = root / "corpus"
    assert main(["build", "--config", str(root / "mixed.yaml"), "--out", str(out), f"privacy.salt_file={salt_file}"]) == 0
    return out


KINDS = {"ct": "ct", "mr": "mr", "pictures": "image"}


def test_build__rows_say_modality_and_range_and_slices_are_what_was_read(mixed):
    corpus = Corpus(mixed)
    assert corpus.modalities == ("ct", "image", "mr")
    seen = {"ct": 0, "mr": 0, "image": 0}
    for index in range(len(corpus)):
        modality, values, span = corpus.modality(index), corpus.read(index), corpus.value_range(index)
        seen[modality] += 1
        if modality == "ct":
            assert values.dtype == np.int16 and span is None
        elif modality == "mr":
            assert values.dtype == np.float32 and values.shape == (64, 72) and span[0] < span[1]
            assert any((values == make_mr(number)).all(axis=(1, 2)).any() for number in range(2))
        else:
            assert values.dtype == np.uint8 and span == (0, 255) and corpus.spacing_mm[index].tolist() == [1, 1]
            assert any(np.array_equal(values, picture(number, number < 3)) for number in range(4))
    assert seen == {"ct": 12, "mr": 10, "image": 4}


def test_build__refusals_say_why(mixed):
    reasons = {row["reason"] for row in Corpus(mixed).volumes.to_pylist() if row["status"] == "rejected"}
    assert len(reasons) == 4
    for words in ("not in HU", "look like CT", "blank picture", "cannot be read"):
        assert sum(words in reason for reason in reasons) == 1, (words, reasons)


@pytest.mark.parametrize(("modality", "low", "high"), [("mr", 0, 1), ("image", 0, 1), ("ct", -3000, 3000)])
def test_check_slices__of_a_mixed_corpus_are_in_the_models_own_range(mixed, modality, low, high):
    for slices in check_slices(8, mixed, modality):
        assert slices.ndim == 3 and slices.min() >= low and slices.max() <= high and slices.std() > 0.01 * (high - low)
