"""Pictures as arrays, in colour DICOM and in archives: every reader's values against another library's, sizes before memory."""

import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from meddino_evaluation.data.pictures import read_mask_picture, read_planes
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DigitalXRayImageStorageForPresentation, JPEGBaseline8Bit, UltrasoundImageStorage

from meddino.core.errors import VolumeError
from meddino.volumes import pictures
from meddino.volumes.pictures import PictureArrays, find_picture_arrays, lifted, read_picture, split_source
from tests.data_curation.dicom_files import ct_slice

RGB = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
RGB[:, 1::2] = RGB[:, ::2]  # pairs of pixels share their colour, as in 4:2:2


def to_ybr(rgb: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2, YBR_FULL."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.clip(np.rint(rgb @ matrix.T + [0, 128, 128]), 0, 255).astype(np.uint8)


def in_halves(ybr: np.ndarray) -> bytes:
    """YBR_FULL_422: two Y, then their common Cb and Cr."""
    pairs = [[row[col, 0], row[col + 1, 0], row[col, 1], row[col, 2]] for row in ybr for col in range(0, len(row), 2)]
    return np.array(pairs, np.uint8).tobytes()


def write_colour(path, photometric: str, data: bytes, planar: int = 0, syntax=None, **changes):
    own = {
        "SOPClassUID": UltrasoundImageStorage, "Modality": "US", "SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8,
        "HighBit": 7, "PlanarConfiguration": planar, "PhotometricInterpretation": photometric, **changes,
    }  # fmt: skip
    item = ct_slice(np.zeros((24, 20)), 0.0, **own)
    if syntax is not None:
        item.file_meta.TransferSyntaxUID = syntax
    item.PixelData = data
    item["PixelData"].VR = "OB"
    item.save_as(path, enforce_file_format=True)
    return path


def as_jpeg(rgb: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "jpeg", quality=95)
    return stream.getvalue()


def same_rgb(values: np.ndarray, atol: int) -> None:
    assert values.shape == (1, 3, 24, 20) and values.dtype == np.uint8
    assert np.abs(values[0].transpose(1, 2, 0).astype(int) - RGB).max() <= atol


@pytest.mark.parametrize(
    ("photometric", "data", "planar", "atol"),
    [
        ("RGB", RGB.tobytes(), 0, 0),
        ("RGB", RGB.transpose(2, 0, 1).tobytes(), 1, 0),
        ("YBR_FULL", to_ybr(RGB).tobytes(), 0, 2),
        ("YBR_FULL", to_ybr(RGB).transpose(2, 0, 1).tobytes(), 1, 2),
        ("YBR_FULL_422", in_halves(to_ybr(RGB)), 0, 2),
    ],
)
def test_read_picture__dicom_colour_is_rgb(tmp_path, photometric, data, planar, atol):
    picture = read_picture(write_colour(tmp_path / "a.dcm", photometric, data, planar))
    same_rgb(picture.values, atol)
    assert (picture.value_range, picture.modality) == ((0.0, 255.0), "US")


def test_read_picture__dicom_jpeg_colour_is_what_pillow_sees(tmp_path):
    packed = as_jpeg(RGB)
    path = write_colour(tmp_path / "a.dcm", "YBR_FULL_422", encapsulate([packed]), syntax=JPEGBaseline8Bit)
    seen = np.asarray(Image.open(io.BytesIO(packed)).convert("RGB"))
    assert np.abs(read_picture(path).values[0].transpose(1, 2, 0).astype(int) - seen).max() <= 2


def test_read_picture__dicom_palette_is_colours_and_no_brightness(tmp_path):
    indices = np.arange(24 * 20, dtype=np.uint8).reshape(24, 20)
    tables = np.random.default_rng(1).integers(0, 256, (3, 256), dtype=np.uint8)
    changes = {"SamplesPerPixel": 1, "PlanarConfiguration": 0}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        changes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        changes[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    picture = read_picture(write_colour(tmp_path / "a.dcm", "PALETTE COLOR", indices.tobytes(), **changes))
    assert np.array_equal(picture.values[0], tables[:, indices])


@pytest.mark.parametrize(
    ("photometric", "data", "changes", "words"),
    [
        ("RGB", RGB.tobytes()[:100], {}, "truncated"),
        ("CMYK", RGB.tobytes(), {}, "cannot be read"),
        ("RGB", RGB.tobytes(), {"Rows": 60000, "Columns": 60000}, "60000 x 60000"),
    ],
)
def test_read_picture__dicom_colour_that_cannot_be_read_is_refused(tmp_path, photometric, data, changes, words):
    with pytest.raises(VolumeError, match=words):
        read_picture(write_colour(tmp_path / "a.dcm", photometric, data, **changes))


def test_find_picture_arrays__by_shapes_of_every_order(tmp_path):
    arrays = {
        "one": np.zeros((9, 8), np.uint8), "rgb": np.zeros((9, 8, 3), np.uint8), "grey": np.zeros((2, 9, 8), np.uint16),
        "last": np.zeros((2, 9, 8, 3), np.uint8), "first": np.zeros((2, 3, 9, 8), np.uint8), "labels": np.zeros((2, 1)),
        "names": np.array(["a", "b"]), "boxes": np.zeros((2, 4), np.int64),
    }  # fmt: skip
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    keys = ("one", "rgb", "grey#0", "grey#1", "last#0", "last#1", "first#0", "first#1")
    assert find_picture_arrays(tmp_path / "a.npz") == PictureArrays(keys, 3)
    shapes = [read_picture(tmp_path / "a.npz", key).values.shape for key in keys]
    assert shapes == [(1, 1, 9, 8), (1, 3, 9, 8), *[(1, 1, 9, 8)] * 2, *[(1, 3, 9, 8)] * 4]
    with pytest.raises(VolumeError, match=r"grey#2.*no such item"):
        read_picture(tmp_path / "a.npz", "grey#2")


class Calls:
    """Unpickled, it would make a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_find_picture_arrays__runs_no_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Calls(tmp_path / "ran")))
    np.savez(tmp_path / "b.npz", images=np.array([Calls(tmp_path / "ran")] * 9, object))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=r"magic|pickle"):
            find_picture_arrays(tmp_path / f"{name}.npz")
        with pytest.raises(ValueError, match=r"magic|pickle"):
            read_picture(tmp_path / f"{name}.npz", "images#0")
    assert not (tmp_path / "ran").exists()


def test_split_source__a_number_sign_may_belong_to_a_name(tmp_path):
    (tmp_path / "set #1").mkdir()
    for name in ("a.npz", "a #2.png"):
        (tmp_path / "set #1" / name).write_bytes(b"")
    folder = f"{tmp_path}/set #1"
    for source, name, key in (("a.npz#images#3", "a.npz", "images#3"), ("a.npz", "a.npz", ""), ("a #2.png", "a #2.png", "")):
        found, found_key = split_source(f"{folder}/{source}")
        assert (found.name, found_key) == (name, key)
    assert split_source("absent.npz#images#3") == (Path("absent.npz"), "images#3")
    assert split_source("absent.png") == (Path("absent.png"), "")


def header_of(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_arrays__a_header_that_promises_more_than_the_file_takes_no_memory(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header_of((10**6, 1000, 1000)) + bytes(1000))
    monkeypatch.setattr(pictures, "MAX_ARRAY_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header_of((64, 512, 512)) + bytes(64 * 512 * 512))
    tracemalloc.start()
    for name, words in (("a", "not what the file holds"), ("b", "unpacks to 16777")):
        for read in (find_picture_arrays, lambda path: read_picture(path, "images#0")):
            with pytest.raises(VolumeError, match=words):
                read(tmp_path / f"{name}.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_find_picture_arrays__floats_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 9, 8), np.float32))
    with pytest.raises(VolumeError, match=r"float32; a picture has 8 or 16 bits"):
        find_picture_arrays(tmp_path / "a.npz")


def test_read_picture__in_an_archive_of_several_pages_and_of_floats(tmp_path):
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.zeros((9, 8), np.float32)).save(tmp_path / "f.tif")
    np.savez(tmp_path / "a.npz", images=RGB)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("a.tif", "a.npz"):
            archive.write(tmp_path / name, name)
    for folder in (tmp_path, tmp_path / "all.zip"):
        picture = read_picture(folder / "a.tif")
        same_rgb(picture.values, 0)
        assert "first of 2 pages" in picture.note
        assert find_picture_arrays(folder / "a.npz").keys == ("images",)
        same_rgb(read_picture(folder / "a.npz", "images").values, 0)
    with pytest.raises(VolumeError, match="floating point"):
        read_picture(tmp_path / "f.tif")


def test_read_picture__more_pixels_than_are_read(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VolumeError, match="more pixels"):
        read_picture(tmp_path / "a.png")


def write_tiff(path, values: np.ndarray, order: str = "<", photometric: int = 1):
    """A grey TIFF of one strip, of any type and order of bytes; Pillow writes only some."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    rows, cols = values.shape
    sample = 2 if values.dtype.kind == "i" else 1
    tags = [(256, cols), (257, rows), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, 8), (277, 1), (278, rows)]
    tags += [(279, len(data)), (339, sample)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0))
    return path


WIDE = np.arange(24 * 20, dtype=np.uint16).reshape(24, 20) * 130


@pytest.mark.parametrize(("order", "photometric"), [("<", 1), (">", 1), ("<", 0)])
def test_tiff_of_16_bits__either_order_of_bytes_and_white_that_is_zero(tmp_path, order, photometric):
    found = read_picture(write_tiff(tmp_path / "a.tif", WIDE, order, photometric))
    assert found.values.dtype == np.uint16 and found.values.dtype.isnative and found.value_range == (0.0, 65535.0)
    np.testing.assert_array_equal(found.values[0, 0], WIDE if photometric else 65535 - WIDE)


@pytest.mark.parametrize("order", ["<", ">"])
def test_mask_of_16_bits__values_above_255_stay(tmp_path, order):
    mask = np.where(WIDE > 30000, 400, 300).astype(np.uint16)
    np.testing.assert_array_equal(read_mask_picture(write_tiff(tmp_path / "m.tif", mask, order))[0], mask)


def test_tiff_of_hounsfield_units__is_no_brightness(tmp_path):
    path = write_tiff(tmp_path / "a.tif", (WIDE.astype(np.int32) - 1024).clip(-1024, 3000).astype(np.int16))
    found = read_picture(path)  # a classification of CT reads its units
    assert found.value_range is None and (found.values.min(), found.values.max()) == (-1024, 3000)
    with pytest.raises(VolumeError, match=r"from -1024 to 3000.*0 to 65535"):
        read_planes(path, 1)  # -1024 was 64512


def test_picture__what_is_left_of_it_is_said(tmp_path):
    turned = Image.fromarray(RGB).getexif()
    turned[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.jpg", exif=turned)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in (RGB.astype(np.uint16) * 257).reshape(24, 60))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20, 24, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert "EXIF orientation 6 is not applied" in read_picture(tmp_path / "turned.jpg").note
    deep = read_picture(tmp_path / "deep.png")
    assert "16 bits a colour" in deep.note
    np.testing.assert_array_equal(deep.values[0].transpose(1, 2, 0), RGB)


@pytest.mark.parametrize(("mode", "alpha", "is_told"), [("RGBA", 7, True), ("LA", 7, True), ("RGBA", 255, False)])
def test_picture__transparency_that_is_left_out_is_said(tmp_path, mode, alpha, is_told):
    picture = Image.fromarray(RGB).convert(mode)
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    Image.fromarray(RGB).quantize(16).save(tmp_path / "palette.png", transparency=0)
    assert read_picture(tmp_path / "a.png").note == ("transparency is left out" if is_told else "")
    assert read_picture(tmp_path / "palette.png").note == "transparency is left out"


@pytest.mark.parametrize(("largest", "is_told"), [(4095, True), (8192, False)])
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_picture_of_16_bits__values_of_12_are_said_to_be_dark(tmp_path, ending, largest, is_told):
    values = np.linspace(0, largest, 480).astype(np.uint16).reshape(24, 20)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    found = read_picture(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(found.values[0, 0], values)
    assert found.value_range == (0.0, 65535.0)
    told = "the largest of its 16-bit values is 4095: read as brightness from 0 to 65535, nearly black"
    assert found.note == (told if is_told else "")


def test_dicom_picture__a_slope_of_0_leaves_the_stored_grey_levels(tmp_path):
    item = ct_slice(WIDE % 1500, 0.0, SOPClassUID=DigitalXRayImageStorageForPresentation, Modality="DX", RescaleSlope=0)
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = read_picture(tmp_path / "a.dcm")
    assert "rescale slope 0 is left out" in found.note
    np.testing.assert_array_equal(found.values[0, 0], WIDE % 1500 + 1024)


def test_dicom_picture__a_fractional_rescale_leaves_the_stored_grey_levels(tmp_path):
    item = ct_slice(WIDE % 1500, 0.0, SOPClassUID=DigitalXRayImageStorageForPresentation, Modality="DX", RescaleIntercept=0)
    item.RescaleSlope = 0.002
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = read_picture(tmp_path / "a.dcm")
    assert "rescale slope 0.002 is left out" in found.note
    assert len(np.unique(lifted(found.values))) == len(np.unique(WIDE % 1500))  # were 4


def test_dicom_picture__without_a_rescale_values_are_as_stored(tmp_path):
    item = ct_slice(WIDE % 1500, 0.0, SOPClassUID=DigitalXRayImageStorageForPresentation, Modality="DX")
    del item.RescaleSlope, item.RescaleIntercept
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = read_picture(tmp_path / "a.dcm")
    assert not found.note
    np.testing.assert_array_equal(found.values[0, 0], WIDE % 1500 + 1024)  # what ct_slice stores


def test_dicom_picture__floating_point_pixels_are_refused_as_such(tmp_path):
    item = ct_slice(WIDE, 0.0, PixelData=None, FloatPixelData=WIDE.astype("<f4").tobytes())
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(VolumeError, match="holds floating point values"):
        read_picture(tmp_path / "a.dcm")
