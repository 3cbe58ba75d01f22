import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from meddino_evaluation.classification.images import ReadingNotes, read_slices
from PIL import Image
from pydicom.data import get_testdata_file

from meddino.core.errors import VolumeError


def test_read_slices__pictures(tmp_path):
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    Image.fromarray(grey).save(tmp_path / "a.png")
    stack = read_slices(str(tmp_path / "a.png"), "image")
    assert stack.values.shape == (1, 1, 4, 5)
    torch.testing.assert_close(stack.tensor(0, 1)[0, 0], torch.from_numpy(grey).float() / 255)
    Image.fromarray(np.stack([grey, grey, grey * 2], -1)).save(tmp_path / "b.png")
    assert read_slices(str(tmp_path / "b.png"), "image").values.shape == (1, 3, 4, 5)
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "c.png")
    assert read_slices(str(tmp_path / "c.png"), "image").tensor(0, 1).max().item() == pytest.approx(19000 / 65535)


def test_read_slices__dicom_is_hounsfield_units():
    path = get_testdata_file("CT_small.dcm")
    stack = read_slices(str(path), "image")
    file = pydicom.dcmread(path)
    assert stack.kind == "hu"
    np.testing.assert_allclose(stack.values[0, 0], file.pixel_array * file.RescaleSlope + file.RescaleIntercept)


def test_read_slices__volume_is_turned_to_lps(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = sitk.GetImageFromArray(array)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(read_slices(str(tmp_path / "v.nii.gz"), "ct").values[:, 0], array[:, ::-1, ::-1])


def test_read_slices__arrays(tmp_path):
    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    np.savez(tmp_path / "a.npz", one=volume[0], many=volume)
    np.save(tmp_path / "b.npy", volume)
    np.testing.assert_array_equal(read_slices(f"{tmp_path}/a.npz#one", "ct").values[0, 0], volume[0])
    np.testing.assert_array_equal(read_slices(f"{tmp_path}/a.npz#many#2", "ct").values[0, 0], volume[2])
    np.testing.assert_array_equal(read_slices(f"{tmp_path}/b.npy", "ct").values[:, 0], volume)
    with pytest.raises(VolumeError, match="holds one, many, not 'two'"):
        read_slices(f"{tmp_path}/a.npz#two", "ct")


def test_read_slices__brightness_by_percentiles(tmp_path):
    values = np.random.default_rng(0).normal(1000, 200, size=(2, 30, 30)).astype(np.float32)
    np.save(tmp_path / "mri.npy", values)
    stack = read_slices(f"{tmp_path}/mri.npy", "image")
    low, high = np.percentile(values, [0.5, 99.5])
    torch.testing.assert_close(stack.tensor(0, 2)[:, 0], torch.from_numpy(np.clip((values - low) / (high - low), 0, 1)).float())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"not a picture", "cannot be read"),
        ("x.nii.gz", b"nothing", "holds none"),
        ("x.npz", b"nothing", "cannot be read"),
        ("x.dcm", b"nothing", "no known kind"),
    ],
)
def test_read_slices__unreadable_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=message) as error:
        read_slices(str(tmp_path / name), "image")
    assert name in str(error.value)


def test_read_slices__constant_not_finite_missing_or_a_pickle(tmp_path):
    np.save(tmp_path / "flat.npy", np.full((3, 8, 8), -1000, dtype=np.int16))
    with pytest.raises(VolumeError, match=r"flat\.npy is constant: every value is -1000"):
        read_slices(f"{tmp_path}/flat.npy", "ct")
    np.save(tmp_path / "nan.npy", np.array([[0.0, np.nan], [1, 2]]))
    with pytest.raises(VolumeError, match="not finite"):
        read_slices(f"{tmp_path}/nan.npy", "ct")
    with pytest.raises(VolumeError, match="does not exist"):
        read_slices(f"{tmp_path}/absent.png", "image")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(VolumeError, match="cannot be read"):
        read_slices(f"{tmp_path}/pickle.npy", "image")


def test_read_slices__a_picture_too_large_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(tmp_path / "big.png")
    monkeypatch.setattr("meddino.volumes.pictures.MAX_PIXELS", 1000)
    with pytest.raises(VolumeError, match="at most 1000 pixels"):
        read_slices(str(tmp_path / "big.png"), "image")


def test_reading_notes__each_thing_once_with_how_many_images(tmp_path):
    pixels, turned = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), Image.Exif()
    turned[0x0112] = 3
    notes = ReadingNotes()
    for name in ("b", "a"):
        pixels.save(tmp_path / f"{name}.jpg", exif=turned)
        notes.add(name, read_slices(str(tmp_path / f"{name}.jpg"), "image"))
    pixels.save(tmp_path / "c.png")
    notes.add("c", read_slices(str(tmp_path / "c.png"), "image"))
    assert notes.lines() == ["2 images, a the first: EXIF orientation 3 is not applied: pixels are taken as they are stored"]
