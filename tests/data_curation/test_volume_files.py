"""NIfTI, NRRD and MetaImage in everything they may hold; NIfTI files are written byte by byte, so that headers can disagree."""

import gzip
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.config import CurationConfig, LimitsConfig

from meddino.core.errors import VolumeError
from meddino.volumes.formats.itk import read_volume_file
from meddino.volumes.orientation import AXIAL_LPS, to_axial_lps
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_bad_files import nifti_header

LIMITS = CurationConfig().limits
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}


def write_nifti(path, voxels, slope=0.0, intercept=0.0, spacing=(1.0, 1.0, 1.0), sform=None, offset=352):
    """Write [Z, Y, X] of any type; `sform` is 3 x 4."""
    kind = voxels.dtype.str[1:]
    header = bytearray(nifti_header(voxels.shape[::-1], CODES[kind], 8 * voxels.dtype.itemsize))
    struct.pack_into("<3f", header, 80, *spacing[::-1])
    struct.pack_into("<3f", header, 108, offset, slope, intercept)
    if sform is not None:
        struct.pack_into("<2h", header, 252, 0, 1)
        struct.pack_into("<12f", header, 280, *np.asarray(sform, float).ravel())
    data = bytes(header) + bytes(offset - 352) + voxels.astype("<" + kind).tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", sorted(CODES))
def test_nifti__every_type_plain_and_scaled(tmp_path, kind):
    low, high = (-1024, 3071) if kind not in ("u1", "i1") else (0, 120)
    values = np.random.default_rng(0).integers(max(low, 0) if kind[0] == "u" else low, high, (3, 5, 7)).astype(kind)
    plain = read_volume_file(write_nifti(tmp_path / "a.nii", values), "nifti", LIMITS).voxels
    assert plain.dtype.kind == values.dtype.kind
    assert np.array_equal(plain, values)
    for slope, intercept in ((1.0, -1024.0), (1.0, 0.5), (2.0, 0.0), (0.5, -3.25), (-1.0, 7.0)):
        path = write_nifti(tmp_path / "b.nii.gz", values, slope, intercept)
        scaled = read_volume_file(path, "nifti", LIMITS).voxels
        assert np.allclose(scaled, values.astype(np.float64) * slope + intercept, atol=1e-3), (slope, intercept)
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat64))
        assert np.allclose(scaled, itk, atol=1e-3)


def test_nifti__slope_of_zero_scales_nothing_and_two_bytes_stay_two_bytes(tmp_path):
    values = np.array([[[0, 1024, 65535]]], np.uint16)
    zero = read_volume_file(write_nifti(tmp_path / "a.nii", values, 0.0, -1024.0), "nifti", LIMITS).voxels
    assert zero.ravel().tolist() == [0, 1024, 65535]
    one = read_volume_file(write_nifti(tmp_path / "a.nii", values // 2, 1.0, -1024.0), "nifti", LIMITS).voxels
    assert one.dtype == np.int16
    assert one.ravel().tolist() == [-1024, -512, 31743]
    wide = read_volume_file(write_nifti(tmp_path / "a.nii", values, 1.0, -1024.0), "nifti", LIMITS).voxels
    assert wide.ravel().tolist() == [-1024, 0, 64511]  # no HU lie out there, but other values do


def test_nifti__whole_numbers_that_nibabel_itself_stores_with_an_intercept(tmp_path):
    """MR of -500 to 63500 as uint16, slope 1: it was cut off at 32767 without a word."""
    values = np.arange(-500, 63500, 640, dtype=np.int32).reshape(4, 5, 5)
    image = nib.Nifti1Image(values.T, np.eye(4))
    image.set_data_dtype(np.uint16)
    nib.save(image, tmp_path / "a.nii")
    assert nib.load(tmp_path / "a.nii").dataobj.inter == -500
    assert np.array_equal(read_volume_file(tmp_path / "a.nii", "nifti", LIMITS).voxels, values)


@pytest.mark.parametrize(
    ("kind", "stored", "intercept", "read_as"),
    [
        ("u1", (0, 255), -1024, "i2"), ("u1", (0, 255), 40000, "u2"), ("u1", (200, 255), -32900, "i2"),
        ("u2", (0, 60000), 100, "u2"), ("u2", (40000, 65535), -40000, "i2"), ("i2", (-32768, 32767), -1, "i4"),
        ("i4", (0, 5), -1024, "i4"), ("i4", (-(2**31), 2**31 - 1), 128, "i8"),
        ("u4", (2**31, 2**32 - 1), -(2**31), "i4"), ("u4", (0, 2**32 - 1), -1024, "i8"),
        ("i8", (-5, 2**40 + 1), -3, "i8"), ("i8", (2**62, 2**63 - 1), 1024, "u8"), ("u8", (2**63, 2**64 - 1), -(2**62), "u8"),
        ("u8", (0, 2**64 - 1), -1024, "f8"),
    ],
)  # fmt: skip
def test_nifti__an_intercept_clips_nothing_and_takes_no_more_room_than_needed(tmp_path, kind, stored, intercept, read_as):
    values = np.array(stored, kind).reshape(1, 1, 2)
    voxels = read_volume_file(write_nifti(tmp_path / "a.nii", values, 1.0, float(intercept)), "nifti", LIMITS).voxels
    assert voxels.dtype == np.dtype(read_as)
    wanted = [value + intercept for value in stored]
    assert voxels.ravel().tolist() == (wanted if read_as != "f8" else pytest.approx(wanted, rel=1e-15))


@pytest.mark.parametrize(("kind", "offset"), [("u2", -500), ("u2", 10**12), ("u4", -1024), ("i4", 10), ("u1", 3)])
def test_metaimage__an_offset_clips_and_rounds_nothing(tmp_path, kind, offset):
    fits = np.iinfo(kind)
    values = np.array([fits.min, fits.max - 1, fits.max], kind).reshape(1, 1, 3)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.mha"))
    line = f"ElementToIntensityFunctionOffset = {offset}\n".encode()
    data = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(data.replace(b"ElementType", line + b"ElementType"))
    voxels = read_volume_file(tmp_path / "a.mha", "metaimage", LIMITS).voxels
    assert voxels.ravel().tolist() == [int(value) + offset for value in values.ravel()]


def test_nifti__blocks_larger_than_one_and_bytes_before_the_voxels(tmp_path, monkeypatch):
    from meddino.volumes.formats import nifti

    monkeypatch.setattr(nifti, "_BLOCK_BYTES", 1000)
    hu = make_hu(0, (3, 20, 31))
    path = write_nifti(tmp_path / "a.nii.gz", hu.astype(np.int32), 1.0, 5.0, offset=1000)
    assert np.array_equal(read_volume_file(path, "nifti", LIMITS).voxels, hu.astype(np.int32) + 5)


@pytest.mark.parametrize("offset", [-1.0, 1e9, float("nan"), float("inf")])
def test_nifti__senseless_place_of_the_voxels_is_refused(tmp_path, offset):
    path = write_nifti(tmp_path / "a.nii", make_hu(0))
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 108, offset)
    path.write_bytes(bytes(data))
    with pytest.raises(VolumeError):
        read_volume_file(path, "nifti", LIMITS)


def test_nifti__sform_and_qform_that_disagree_are_noted_and_sheared_axes_too(tmp_path):
    hu = make_hu(0)
    path = write_volume(tmp_path / "a.nii", hu)
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<2h", data, 252) == (1, 1)
    struct.pack_into("<12f", data, 280, -4.5, 0, 0, 0, 0, -9.0, 0, 0, 0, 0, 5.0, 0)  # the qform's pixels are 4.5 mm
    path.write_bytes(bytes(data))
    assert "sform and qform disagree" in read_volume_file(path, "nifti", LIMITS).notes
    sheared = write_nifti(tmp_path / "b.nii", hu, sform=[[-4.5, 0, 0, 0], [0, -4.5, 1.2, 0], [0, 0, 5.0, 0]])
    volume = read_volume_file(sheared, "nifti", LIMITS)
    assert any("degrees off a right angle" in note for note in volume.notes)
    turned, _ = to_axial_lps(volume, 35.0)
    assert np.array_equal(turned.planes, hu)  # noted, not bent: no voxel was changed


def test_nifti__sform_and_qform_that_differ_in_place_alone_are_noted(tmp_path):
    path = write_volume(tmp_path / "a.nii", make_hu(0))
    data = bytearray(path.read_bytes())
    assert not any("disagree" in note for note in read_volume_file(path, "nifti", LIMITS).notes)
    (offset,) = struct.unpack_from("<f", data, 268)
    struct.pack_into("<f", data, 268, offset + 50)  # qoffset_x, mm
    path.write_bytes(bytes(data))
    assert "sform and qform disagree" in read_volume_file(path, "nifti", LIMITS).notes


def test_nifti__an_axis_that_is_one_voxel_short_is_refused_and_padding_is_not(tmp_path):
    hu = make_hu(0)
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_header((71, 64, 6)) + hu.astype("<i2").tobytes())
    with pytest.raises(VolumeError, match="goes on behind the last voxel"):
        read_volume_file(path, "nifti", LIMITS)
    path.write_bytes(nifti_header((72, 64, 6)) + hu.astype("<i2").tobytes() + bytes(512))
    assert np.array_equal(read_volume_file(path, "nifti", LIMITS).voxels, hu)


def test_nifti__oblique_axes_are_resampled_upright_and_values_lie_where_they_were(tmp_path):
    grid = np.mgrid[0:40, 0:50, 0:60]
    hu = (2 * grid[0] + 3 * grid[1] - grid[2]).astype(np.int16)
    angle = np.radians(40)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    path = write_nifti(tmp_path / "a.nii", hu, sform=np.column_stack([np.diag([-1, -1, 1]) @ turn, [10, 20, 30]]))
    volume = read_volume_file(path, "nifti", LIMITS)
    upright, tilt = to_axial_lps(volume, 35.0)
    assert tilt == pytest.approx(40, abs=0.01)
    assert "oblique: resampled upright" in upright.notes
    np.testing.assert_allclose(upright.geometry.axes, AXIAL_LPS, atol=1e-6)
    image = sitk.ReadImage(str(path), sitk.sitkFloat64)
    z, y, x = (int(size) for size in upright.planes.shape)
    checked = 0
    for index in np.random.default_rng(0).integers(0, [x, y, z], (400, 3)):
        place = np.asarray(upright.geometry.origin_mm) + index * np.asarray(upright.geometry.spacing_mm)[::-1]
        stored = np.asarray(image.TransformPhysicalPointToContinuousIndex(place.tolist()))
        value = upright.planes[int(index[2])][index[1], index[0]]
        if (stored > 0).all() and (stored < np.array([59, 49, 39])).all():
            assert value == pytest.approx(2 * stored[2] + 3 * stored[1] - stored[0], abs=0.51)
            checked += 1
        elif (stored < -0.6).any() or (stored > np.array([59.6, 49.6, 39.6])).any():
            assert value == -1024
    assert checked > 50
    with pytest.raises(VolumeError, match="once upright"):
        to_axial_lps(volume, 35.0, max_voxels=hu.size)


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
@pytest.mark.parametrize("kind", ["int16", "uint16", "int32", "float32", "float64"])
def test_nrrd_and_metaimage__hold_what_was_written(tmp_path, ending, kind):
    values = (make_hu(0).astype(np.int32) + (1024 if kind == "uint16" else 0)).astype(kind)
    path = write_volume(tmp_path / f"a.{ending}", values)
    volume = read_volume_file(path, "nrrd" if ending.startswith("n") else "metaimage", LIMITS)
    assert np.array_equal(volume.voxels, values)
    assert volume.geometry.spacing_mm == (5.0, 4.5, 4.5)


def endless(data: bytes, blocks: int) -> bytes:
    """Return gzip data that begins with `data` and inflates to `blocks` MiB of zeros more, made without inflating it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + start + block * blocks + packer.flush(zlib.Z_FINISH) + bytes(8)


@pytest.mark.parametrize("honest", [True, False])
def test_bomb__16_gib_in_a_small_file_is_refused_in_little_memory(tmp_path, honest):
    hu = make_hu(0)
    header = nifti_header((2048, 2048, 2048) if honest else hu.shape[::-1])
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(endless(header + hu.astype("<i2").tobytes(), 16 << 10))
    assert path.stat().st_size < 40 << 20
    tracemalloc.start()
    with pytest.raises(VolumeError, match="max_volume_voxels" if honest else "goes on behind the last voxel"):
        read_volume_file(path, "nifti", LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_bomb__other_formats_take_no_more_than_their_header_says(tmp_path):
    hu = make_hu(0)
    for name, format, end in (("a.nrrd", "nrrd", b"\n\n"), ("a.mha", "metaimage", b"LOCAL\n")):
        path = write_volume(tmp_path / name, hu)
        data = path.read_bytes()
        start = data.index(end) + len(end)
        packed = endless(hu.tobytes(), 512)
        body = packed if format == "nrrd" else b"\x78\x9c" + packed[10:]
        header = data[:start]
        if format == "metaimage":
            lines = [line for line in header.splitlines(keepends=True) if not line.startswith(b"CompressedDataSize")]
            header = b"".join(lines[:-1]) + b"CompressedDataSize = %d\n" % len(body) + lines[-1]
        path.write_bytes(header + body)
        before = _resident_peak()
        with pytest.raises(VolumeError, match="goes on behind the last voxel"):
            read_volume_file(path, format, LIMITS)
        assert _resident_peak() - before < 64 << 20


def _resident_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_read_volume_file__long_axis_in_a_tiny_file_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "long.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 100000 100000 3\nendian: little\nencoding: raw\n\n" + bytes(64)
    )
    with pytest.raises(VolumeError, match="max_axis_px"):
        read_volume_file(path, "nrrd", LIMITS)
    path.write_bytes(path.read_bytes().replace(b"100000 100000 3", b"10000 10000 10"))
    with pytest.raises(VolumeError, match="cannot hold"):
        read_volume_file(path, "nrrd", LIMITS)
    (tmp_path / "long.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 100000 4 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + bytes(64)
    )
    with pytest.raises(VolumeError, match="max_axis_px"):
        read_volume_file(tmp_path / "long.mha", "metaimage", LimitsConfig())
