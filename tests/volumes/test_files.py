"""NIfTI, NRRD and MetaImage: place, direction, units and values against what was written; what is assumed is told."""

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from meddino.core.errors import VolumeError
from meddino.volumes.channels import case_names
from meddino.volumes.limits import ReadLimits
from meddino.volumes.orientation import AXIAL_LPS, turn_to_lps
from meddino.volumes.read import read_volume
from meddino.volumes.writing import write_volume
from tests.data_curation.conftest import make_hu

CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
TO_LPS = np.array([-1.0, -1.0, 1.0])
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def nifti(voxels, affine=None, form="sform", unit=2, slope=0.0, intercept=0.0, version=1, extra_axes=0, pixdim=None) -> bytes:
    """A NIfTI file byte by byte; affine in RAS and in the unit's numbers."""
    kind = voxels.dtype.str[1:]
    sizes = np.linalg.norm(affine[:3, :3], axis=0) if affine is not None else np.ones(3)
    dims = (3 + extra_axes, *voxels.shape[::-1], *([1] * 4))
    whole, real = ("h", "f") if version == 1 else ("q", "d")
    head = bytearray(352 if version == 1 else 544)
    at = {"dim": 40, "code": 70, "pixdim": 76, "offset": 108, "codes": 252, "q": 256, "s": 280} if version == 1 else {
        "dim": 16, "code": 12, "pixdim": 104, "offset": 168, "codes": 344, "q": 352, "s": 400}  # fmt: skip
    struct.pack_into("<i", head, 0, 348 if version == 1 else 540)
    struct.pack_into(f"<8{whole}", head, at["dim"], *dims)
    struct.pack_into("<2h", head, at["code"], CODES[kind], 8 * voxels.dtype.itemsize)
    qfac = 1.0
    if affine is not None and form == "qform":
        turn = affine[:3, :3] / sizes
        qfac = -1.0 if np.linalg.det(turn) < 0 else 1.0
        x, y, z, w = Rotation.from_matrix(turn * [1, 1, qfac]).as_quat()
        b, c, d = np.array([x, y, z]) * (1 if w >= 0 else -1)
        struct.pack_into(f"<6{real}", head, at["q"], b, c, d, *affine[:3, 3])
    if affine is not None and form == "sform":
        struct.pack_into(f"<12{real}", head, at["s"], *affine[:3].ravel())
    struct.pack_into(f"<4{real}", head, at["pixdim"], qfac, *(sizes if pixdim is None else pixdim))
    codes = (int(form == "qform" and affine is not None), int(form == "sform" and affine is not None))
    struct.pack_into("<2h" if version == 1 else "<2i", head, at["codes"], *codes)
    if version == 1:
        struct.pack_into("<3f", head, 108, 352, slope, intercept)
        head[123], head[344:348] = unit, b"n+1\0"
    else:
        struct.pack_into("<q2d", head, 168, 544, slope, intercept)
        struct.pack_into("<i", head, 500, unit)
        head[4:12] = b"n+2\0\r\n\x1a\n"
    return bytes(head) + voxels.astype(f"<{kind}").tobytes()


def grid(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    flips = rng.choice([-1.0, 1.0], 3)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() * rng.uniform(0.3, 5, 3) * flips
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@QUICK
@given(
    seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(CODES)), form=st.sampled_from(["qform", "sform"]),
    unit=st.sampled_from([(1, 1000.0), (2, 1.0), (3, 0.001)]), version=st.sampled_from([1, 2]),
    scale=st.sampled_from([(0.0, 0.0), (1.0, -1024.0), (2.0, 0.5)]), packed=st.booleans(), extra=st.integers(0, 4),
)  # fmt: skip
def test_nifti__lies_where_its_affine_says_and_holds_what_was_written(
    tmp_path, seed, kind, form, unit, version, scale, packed, extra
):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 100, rng.integers(1, 6, 3)).astype(kind)
    affine = grid(seed)
    stored = affine.copy()
    stored[:3] /= unit[1]
    data = nifti(voxels, stored, form, unit[0], *scale, version, extra)
    path = tmp_path / "a.nii"  # its ending says nothing of being packed
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    volume = read_volume(path)
    slope, intercept = scale if scale[0] else (1.0, 0.0)
    np.testing.assert_allclose(volume.voxels, voxels.astype(np.float64) * slope + intercept, atol=1e-4)
    size = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(volume.geometry.spacing_mm, size[::-1], rtol=1e-5)
    ends = np.array(voxels.shape[::-1]) - 1
    last = (affine[:3, :3] @ ends + affine[:3, 3]) * TO_LPS
    np.testing.assert_allclose(volume.geometry.corners_mm()[0], affine[:3, 3] * TO_LPS, atol=1e-2)
    np.testing.assert_allclose(volume.geometry.corners_mm()[-1], last, atol=1e-2)


@QUICK
@given(
    seed=st.integers(0, 2**31), ending=st.sampled_from(["nrrd", "mha", "nhdr", "mhd"]), packed=st.booleans(),
    kind=st.sampled_from(["u1", "i2", "u2", "i4", "u4", "f4", "f8"]),
)  # fmt: skip
def test_nrrd_and_metaimage__lie_where_they_were_written(tmp_path, seed, ending, packed, kind):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 200, rng.integers(2, 6, 3)).astype(kind)
    affine = grid(seed)
    size = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(size.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / size).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"a.{ending}"), useCompression=packed)
    volume = read_volume(tmp_path / f"a.{ending}")
    assert np.array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == voxels.dtype
    ends = [int(end) - 1 for end in voxels.shape[::-1]]
    np.testing.assert_allclose(volume.geometry.corners_mm()[-1], image.TransformIndexToPhysicalPoint(ends), atol=1e-3)


SPACES = {"right-anterior-superior": (-1, -1, 1), "LAS": (1, -1, 1), "left-posterior-superior": (1, 1, 1)}
NRRD_TYPES = {"i2": "short", "u2": "unsigned short", "f4": "float", "i4": "int"}


@QUICK
@given(
    seed=st.integers(0, 2**31), space=st.sampled_from(sorted(SPACES)), kind=st.sampled_from(sorted(NRRD_TYPES)),
    order=st.sampled_from("<>"), packed=st.booleans(), unit=st.sampled_from([("mm", 1.0), ("cm", 10.0), ("um", 0.001)]),
)  # fmt: skip
def test_nrrd__written_by_hand_in_any_space_unit_type_and_byte_order(tmp_path, seed, space, kind, order, packed, unit):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 1000, rng.integers(2, 6, 3)).astype(kind)
    affine = grid(seed)  # LPS, mm
    written = affine[:3] * np.array(SPACES[space])[:, None] / unit[1]
    vectors = ["(" + ",".join(f"{value:.12g}" for value in written[:, axis]) + ")" for axis in range(4)]
    head = f"""NRRD0004\ntype: {NRRD_TYPES[kind]}\ndimension: 3\nspace: {space}\nsizes: {" ".join(map(str, voxels.shape[::-1]))}
space directions: {" ".join(vectors[:3])}\nspace origin: {vectors[3]}\nspace units: {" ".join([f'"{unit[0]}"'] * 3)}
encoding: {"gzip" if packed else "raw"}\nendian: {"little" if order == "<" else "big"}\n\n"""
    data = voxels.astype(order + kind).tobytes()
    (tmp_path / "a.nrrd").write_bytes(head.encode() + (gzip.compress(data, 1) if packed else data))
    volume = read_volume(tmp_path / "a.nrrd")
    assert np.array_equal(volume.voxels, voxels)
    last = affine[:3, :3] @ (np.array(voxels.shape[::-1]) - 1) + affine[:3, 3]
    np.testing.assert_allclose(volume.geometry.corners_mm()[0], affine[:3, 3], atol=1e-3)
    np.testing.assert_allclose(volume.geometry.corners_mm()[-1], last, atol=1e-3)


def test_nifti__what_is_assumed_is_told(tmp_path):
    hu = make_hu(0)
    path = tmp_path / "a.nii"
    path.write_bytes(nifti(hu, None, unit=0, pixdim=(3.4, 3.5, 3.0)))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.geometry.axes, AXIAL_LPS)
    assert len(volume.notes) == 2
    assert "orientation is not in the file" in volume.notes[0]
    assert "units are not in the file" in volume.notes[1]
    affine = np.diag([-3.4, -3.5, 3.0, 1.0])
    path.write_bytes(nifti(hu, affine, pixdim=(1.0, 1.0, 1.0)))
    volume = read_volume(path)
    assert volume.geometry.spacing_mm == pytest.approx((3.0, 3.5, 3.4))
    assert volume.notes == ("voxel size and sform disagree: the sform's is taken",)
    path.write_bytes(nifti(hu, affine, unit=5))
    with pytest.raises(VolumeError, match="units of space 5"):
        read_volume(path)


@pytest.mark.parametrize(("letters", "told"), [("RAI", 1), ("LPI", 2), ("???", 1)])
def test_metaimage__an_orientation_in_letters_alone_is_not_followed_and_told(tmp_path, letters, told):
    head = "ObjectType = Image\nNDims = 3\nElementSpacing = 1 1 1\nDimSize = 8 8 8\nElementType = MET_SHORT\n"
    head += f"AnatomicalOrientation = {letters}\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(head.encode() + make_hu(0, (8, 8, 8)).tobytes())
    notes = read_volume(tmp_path / "a.mha").notes
    assert len(notes) == told and "orientation is not in the file" in notes[0]
    assert told == 1 or notes[1] == "AnatomicalOrientation LPI, which says otherwise, is not followed"


def test_nifti__a_shear_by_rounding_is_read_and_a_real_one_is_no_regular_grid(tmp_path):
    hu, path = make_hu(0), tmp_path / "a.nii"
    small = np.array([[-3.4, 0.02, 0, 190], [0, -3.5, 0.03, 160], [0.01, 0, 3.0, 10], [0, 0, 0, 1]])
    path.write_bytes(nifti(hu, small))
    volume = read_volume(path)
    assert volume.irregular == ""
    assert np.array_equal(turn_to_lps(volume.geometry).apply(volume.voxels), hu)
    small[1, 2] = 1.2
    path.write_bytes(nifti(hu, small))
    assert "off a right angle" in read_volume(path).irregular


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 72 64 6\nencoding: raw\nendian: little\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = 72 64 6\nElementType = MET_SHORT\n"


@pytest.mark.parametrize(
    ("unit", "spacing"),
    [('"um" "um" "um"', 0.001), ('"cm" "cm" "cm"', 10.0), ('"mm" "mm" "mm"', 1.0), ("", 1.0), ('"s" "mm" "mm"', None)],
)
def test_nrrd__units_count_and_strange_ones_are_refused(tmp_path, unit, spacing):
    space = "space: left-posterior-superior\nspace directions: (3.4,0,0) (0,3.5,0) (0,0,3)\nspace origin: (1,2,3)\n"
    units = f"space units: {unit}\n" if unit else ""
    (tmp_path / "a.nrrd").write_bytes((NRRD + space + units + "\n").encode() + make_hu(0).tobytes())
    if spacing is None:
        with pytest.raises(VolumeError, match="units of the voxel size are mm, s"):
            read_volume(tmp_path / "a.nrrd")
        return
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.geometry.spacing_mm == pytest.approx((3 * spacing, 3.5 * spacing, 3.4 * spacing))
    assert volume.geometry.origin_mm == pytest.approx((spacing, 2 * spacing, 3 * spacing))
    assert bool(volume.notes) == (not unit)


def test_nrrd__units_of_axes_that_have_spacings_count_too(tmp_path):
    header = NRRD + 'spacings: 0.34 0.35 0.3\nunits: "cm" "cm" "cm"\n\n'
    (tmp_path / "a.nrrd").write_bytes(header.encode() + make_hu(0).tobytes())
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.geometry.spacing_mm == pytest.approx((3.0, 3.5, 3.4))
    assert not any("units" in note for note in volume.notes)


@pytest.mark.parametrize(("name", "header"), [("a.nrrd", NRRD + "\n"), ("a.mha", META + "ElementDataFile = LOCAL\n")])
def test_a_voxel_size_that_is_not_in_the_file__is_refused_or_told(tmp_path, name, header):
    (tmp_path / name).write_bytes(header.encode() + make_hu(0).tobytes())
    with pytest.raises(VolumeError, match=r"limits\.missing_spacing_mm"):
        read_volume(tmp_path / name)
    volume = read_volume(tmp_path / name, ReadLimits(missing_spacing_mm=0.5))
    assert volume.geometry.spacing_mm == (0.5, 0.5, 0.5)
    assert "voxel size is not in the file: taken as 0.5 mm" in volume.notes
    assert "orientation is not in the file" in volume.notes[-1]


def test_names__in_bytes_that_are_no_utf8(tmp_path):
    import os

    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    for ending in ("nrrd", "mha", "mhd", "nii.gz"):
        image = sitk.GetImageFromArray(make_hu(0))
        sitk.WriteImage(image, str(tmp_path / f"a.{ending}"))
        for file in tmp_path.glob("a.*"):
            file.rename(folder / file.name)
        volume = read_volume(folder / f"a.{ending}")
        assert np.array_equal(volume.voxels, make_hu(0)), ending
        if ending not in ("mhd", "nhdr"):
            write_volume(folder / f"b.1.{ending}", volume.voxels, volume.geometry)
            assert np.array_equal(read_volume(folder / f"b.1.{ending}").voxels, make_hu(0)), ending


@pytest.mark.parametrize(
    ("names", "channels", "cases"),
    [
        (["word_0001", "word_0002"], None, ["word_0001", "word_0002"]),
        (["covid19_0000", "covid19_0001", "covid19_0002"], None, ["covid19_0000", "covid19_0001", "covid19_0002"]),
        (["a_0000", "b_0000"], None, ["a", "b"]),
        (["a_0000", "a_0001", "b_0000", "b_0001"], None, ["a", "b"]),
        (["a_0000", "a_0001"], 2, ["a"]),
        (["a_0000", "a_0001", "scan"], 1, ["a_0000", "a_0001", "scan"]),
        (["case_1.2_0001_0000", "P.3_0000"], None, ["case_1.2_0001", "P.3"]),
    ],
)
def test_case_names__digits_are_a_channel_only_where_the_set_of_names_says_so(names, channels, cases):
    assert list(dict.fromkeys(case_names(names, channels).values())) == cases


def test_metaimage__its_own_rescale_is_applied(tmp_path):
    scale = "ElementSpacing = 1 1 1\nElementToIntensityFunctionSlope = {}\nElementToIntensityFunctionOffset = -1024\n"
    stored = (make_hu(0).astype(np.int32) + 1024).astype("<i2")
    for slope in (1, 0.5):
        header = META + scale.format(slope) + "ElementDataFile = LOCAL\n"
        (tmp_path / "a.mha").write_bytes(header.encode() + stored.tobytes())
        np.testing.assert_allclose(read_volume(tmp_path / "a.mha").voxels, stored.astype(np.float64) * slope - 1024)


@pytest.mark.parametrize(("kind", "stored", "intercept"), [("i2", 5, 1e12), ("i4", 2**31 - 2, 10.0), ("u4", 2**32 - 1, -24.0)])
def test_nifti__an_intercept_never_wraps_a_value_round(tmp_path, kind, stored, intercept):
    """Found by damaged files: 1e12 ended the reading; 2^31 wrapped round without a word."""
    (tmp_path / "a.nii").write_bytes(nifti(np.full((2, 2, 2), stored, kind), np.eye(4), slope=1.0, intercept=intercept))
    value = float(read_volume(tmp_path / "a.nii").voxels[0, 0, 0])
    assert value == stored + int(np.float32(intercept))


SHEARED = 'space: LPS\nspace directions: (2,1,0) (0,2,0) (0,0,3)\nspace units: "mm" "mm" "mm"\n'


@pytest.mark.parametrize(
    ("name", "header", "degrees"),
    [
        ("a.nrrd", SHEARED, 26.6),
        ("a.nrrd", SHEARED.replace("(2,1,0)", "(2,0.02,0)"), 0),
        ("a.mha", "ElementSpacing = 2 2 3\nTransformMatrix = 1 0.5 0 0 1 0 0 0 1\n", 26.6),
        ("a.mha", "ElementSpacing = 2 2 3\nTransformMatrix = 2 0 0 0 2 0 0 0 2\n", 0),
        ("a.mha", "ElementSpacing = 2 2 3\nTransformMatrix = 1.000001 0 0 0 1 0 0 0 1\n", 0),
    ],
)
def test_nrrd_and_metaimage__sheared_axes_are_told_and_scaled_ones_lie_where_itk_has_them(tmp_path, name, header, degrees):
    start = NRRD + header + "\n" if name.endswith("nrrd") else META + header + "ElementDataFile = LOCAL\n"
    (tmp_path / name).write_bytes(start.encode() + make_hu(0).tobytes())
    volume = read_volume(tmp_path / name)
    axes = volume.geometry.axes
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    assert volume.irregular == (f"axes are {degrees} degrees off a right angle" if degrees else "")
    if degrees:
        assert volume.irregular in volume.notes
        return
    image = sitk.ReadImage(str(tmp_path / name))
    last = image.TransformIndexToPhysicalPoint((71, 63, 5))
    np.testing.assert_allclose(volume.geometry.corners_mm()[-1], last, atol=1.0 if "0.02" in header else 1e-3)
    is_scaled = "= 2 0 0" in header
    assert volume.spacing_mm == ((6.0, 4.0, 4.0) if is_scaled else pytest.approx((3, 2, 2), rel=1e-4))
    assert volume.notes == (("axes are not of length 1: the voxel size is multiplied by their lengths",) if is_scaled else ())


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("a.nrrd", "spacings: nan 2 3\n", r"voxel spacing \[3.0, 2.0, nan\] mm; must be above 0"),
        ("a.nrrd", "spacings: -2 2 3\n", r"voxel spacing \[3.0, 2.0, -2.0\] mm; must be above 0"),
        ("a.nrrd", "space: LPS\nspace directions: (2,0,0) (0,2,0) none\n", r"voxel spacing \[nan, 2.0, 2.0\] mm"),
        ("a.nrrd", "space: LPS\nspace directions: (2,0,0) (0,0,0) (0,0,3)\n", r"voxel spacing \[3.0, 0.0, 2.0\] mm"),
        (
            "a.nrrd",
            "space: LPS\nspace directions: (2,0,0) (2,0,0) (0,0,3)\n",
            "axes of the voxels are .* must be three directions",
        ),
        ("a.nrrd", "spacings: 2 2 3\naxis mins: 1 nan 1\n", "the first voxel lies at"),
        ("a.mha", "ElementSpacing = 0 2 3\n", r"voxel spacing \[3.0, 2.0, 0.0\] mm"),
        ("a.mha", "ElementSpacing = 2 2 3\nTransformMatrix = 0 0 0 0 0 0 0 0 0\n", "must be three directions"),
    ],
)
def test_nrrd_and_metaimage__what_is_no_grid_is_refused_with_the_value(tmp_path, name, header, message):
    start = NRRD + header + "\n" if name.endswith("nrrd") else META + header + "ElementDataFile = LOCAL\n"
    (tmp_path / name).write_bytes(start.encode() + make_hu(0).tobytes())
    with pytest.raises(VolumeError, match=message):
        read_volume(tmp_path / name)


@pytest.mark.parametrize(
    ("space", "turn", "is_known"),
    [
        ("LPS", (1, 1, 1), True), ("RAS", (-1, -1, 1), True), ("left-anterior-superior", (1, -1, 1), True),
        ("scanner-xyz", (1, 1, 1), False), ("3D-right-handed", (1, 1, 1), False), ("LPST", (1, 1, 1), True),
        ("RAST", (-1, -1, 1), True), ("left-anterior-superior-time", (1, -1, 1), True), ("scanner-xyz-time", (1, 1, 1), False),
    ],
)  # fmt: skip
def test_nrrd__a_space_that_names_no_anatomy_is_told_and_time_turns_none_round(tmp_path, space, turn, is_known):
    """ITK turns RAS to LPS, and leaves right-anterior-superior-time as it is."""
    kind = "{}"
    header = (
        NRRD + f"space: {space}\nspace directions: (2,0,0{kind}) (0,2,0{kind}) (0,0,3{kind})\nspace origin: (1,2,3{kind})\n"
    )
    if space.lower().endswith(("time", "st")):
        header = header.replace("dimension: 3", "dimension: 4").replace("72 64 6", "72 64 6 1").replace(kind, ",0")
        header = header.replace("(0,0,3,0)", "(0,0,3,0) (0,0,0,1)") + 'space units: "mm" "mm" "mm" "s"\n'
    header = header.replace(kind, "")
    (tmp_path / "a.nrrd").write_bytes((header + "\n").encode() + make_hu(0).tobytes())
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.geometry.origin_mm, np.multiply(turn, (1, 2, 3)))
    np.testing.assert_array_equal(volume.geometry.axes, (np.eye(3) * turn)[::-1])
    assert any("orientation is not in the file" in note for note in volume.notes) != is_known


def test_nrrd__values_of_one_voxel_need_no_step(tmp_path):
    header = NRRD.replace("dimension: 3", "dimension: 4").replace("72 64 6", "1 72 64 6")
    header += "kinds: list domain domain domain\nspacings: nan 2 2 3\n"
    (tmp_path / "a.nrrd").write_bytes((header + "\n").encode() + make_hu(0).tobytes())
    assert read_volume(tmp_path / "a.nrrd").spacing_mm == (3.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.nrrd", 'space: LPS\nspace directions: (2,0,0) (0,2,0) (0,0,3)\nspace units: "Jane Doe" "1961-03-04" "MRN 4711"\n'),
        ("a.nrrd", 'space: LPS\nspace directions: (2,0,0) (0,2,0) (0,0,3)\nspaceunits: "Jane Doe" "mm" "s"\n'),
        ("a.nrrd", "spacings: Jane Doe 4711\n"),
        ("a.nrrd", "spacings: 2 2 3\nkinds: Jane Doe 4711\n"),
        ("a.nrrd", "spacings: 2 2 3\nspace: Jane Doe 4711\n"),
        ("a.mha", "ElementSpacing = 2 2 3\nDistanceUnits = Doe^Jane-1961-03-04-4711\n"),
        ("a.mha", "ElementSpacing = Jane Doe 4711\n"),
        ("a.mha", "ElementSpacing = 2 2 3\nCompressedData = True\nCompressedDataSize = Jane Doe 4711\n"),
        ("a.mha", "ElementSpacing = 2 2 3\nElementToIntensityFunctionSlope = Jane Doe 4711\n"),
    ],
)
def test_nrrd_and_metaimage__no_refusal_repeats_words_of_a_header(tmp_path, name, header, capfd):
    start = NRRD + header + "\n" if name.endswith("nrrd") else META + header + "ElementDataFile = LOCAL\n"
    (tmp_path / name).write_bytes(start.encode() + make_hu(0).tobytes())
    with pytest.raises(VolumeError) as caught:
        read_volume(tmp_path / name)
    said = (str(caught.value).replace(str(tmp_path), "") + capfd.readouterr().err).lower()
    assert not [word for word in ("jane", "doe", "1961", "4711") if word in said]
