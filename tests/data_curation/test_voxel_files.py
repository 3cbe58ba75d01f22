"""Headers whose voxels lie in files of their own: what they promise, where they point, and when those files change."""

import gzip
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.config import CurationConfig

from meddino.core.errors import VolumeError
from meddino.volumes.formats.itk import read_volume_file
from meddino.volumes.formats.voxel_files import find_voxel_files
from meddino.volumes.read import read_volume
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_build import run_build
from tests.data_curation.test_held_out import rows_by_place

LIMITS = CurationConfig().limits
NRRD = "NRRD0004\ntype: short\ndimension: 3\nspacings: 1 1 1\nsizes: 72 64 6\nencoding: raw\nendian: little\n"
META = "ObjectType = Image\nNDims = 3\nElementSpacing = 1 1 1\nDimSize = 72 64 6\nElementType = MET_SHORT\n"
PEAK = """
import resource, sys
from pathlib import Path
from meddino_data_curation.config import CurationConfig
from meddino.volumes.formats.itk import read_volume_file
from meddino.core.errors import VolumeError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_volume_file(Path(sys.argv[1]), sys.argv[2], CurationConfig().limits)
except VolumeError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("ending", ["nrrd", "mha", "nii"])
def test_read_volume_file__voxels_outlive_the_volume(tmp_path, ending):
    hu = make_hu(0, (40, 256, 256))
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / f"a.{ending}"))
    voxels = np.asarray(read_volume(tmp_path / f"a.{ending}"))
    view = voxels[3:]
    del voxels
    others = [np.full(hu.shape, 7, np.int16) for _ in range(6)]  # what would come into memory that is given back
    assert np.array_equal(view, hu[3:]) and len(others) == 6


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_read_volume_file__voxels_elsewhere_that_are_too_few_are_refused_before_memory_is_taken(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    if ending == ".mhd":
        path.write_text(META.replace("72 64 6", "16000 16000 5").replace("SHORT", "DOUBLE") + "ElementDataFile = a.raw\n")
    else:
        path.write_text(NRRD.replace("72 64 6", "16000 16000 5").replace("short", "double") + "data file: a.raw\n")
    format = {".mhd": "metaimage", ".nhdr": "nrrd"}[ending]
    command = [sys.executable, "-c", PEAK, str(path), format]
    taken_kib, _, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(" ")
    assert "header promises 10240000000 bytes, which 1 files of voxels with 1000 bytes cannot hold" in said
    assert int(taken_kib) < 100_000


@pytest.mark.parametrize("format", ["metaimage", "nrrd"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../a.raw", "sub/../../a.raw", "..\\a.raw", "LIST"])
def test_read_volume_file__voxels_outside_the_headers_folder_are_refused(tmp_path, format, name):
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    (tmp_path / "a.raw").write_bytes(make_hu(0).tobytes())
    path = inner / ("a.mhd" if format == "metaimage" else "a.nhdr")
    words = "LIST\n../a.raw" if name == "LIST" else name
    path.write_text(META + f"ElementDataFile = {words}\n" if format == "metaimage" else NRRD + f"data file: {words}\n")
    with pytest.raises(VolumeError, match="outside its own folder") as caught:
        read_volume_file(path, format, LIMITS)
    assert name.strip("./\\") not in str(caught.value).replace("LIST", "") or name == "LIST"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("a.raw", ["a.raw"]),
        ("sub/./a.raw", ["sub/a.raw"]),
        ("LIST\na 1.raw\nb.raw", ["a 1.raw", "b.raw"]),
        ("LIST 2\na.raw\nb.raw\n", ["a.raw", "b.raw"]),
        ("z%02d.raw 1 5 2", ["z01.raw", "z03.raw", "z05.raw"]),
        ("z%d.raw 3 1 -1", ["z3.raw", "z2.raw", "z1.raw"]),
    ],
)
def test_find_voxel_files__names_of_every_kind(tmp_path, value, names):
    (tmp_path / "a.mhd").write_text(META + f"ElementDataFile = {value}")
    (tmp_path / "a.nhdr").write_text(NRRD + f"key:=data file: /etc/passwd\n# data file: /etc/passwd\ndata file: {value}")
    for path, format in ((tmp_path / "a.mhd", "metaimage"), (tmp_path / "a.nhdr", "nrrd")):
        assert find_voxel_files(path, format).files == tuple(tmp_path / name for name in names)


@pytest.mark.parametrize(
    "value",
    ["z%s.raw 1 5 1", "z%d%d.raw 1 5 1", "z%d.raw 1 5 0", "z%d.raw 1 999999999 1", "%n 1 2 1", f"z%d.raw 0 {'9' * 5000} 1"],
)
def test_find_voxel_files__patterns_that_are_not_understood_are_refused(tmp_path, value):
    (tmp_path / "a.mhd").write_text(META + f"ElementDataFile = {value}")
    with pytest.raises(VolumeError, match="by a pattern"):
        find_voxel_files(tmp_path / "a.mhd", "metaimage")


def test_find_voxel_files__a_negative_number_of_axes_is_refused_before_itk_counts_to_it(tmp_path):
    (tmp_path / "a.mha").write_text(META.replace("NDims = 3", "NDims = -3") + "ElementDataFile = LOCAL\n")
    with pytest.raises(VolumeError, match="number of axes"):
        find_voxel_files(tmp_path / "a.mha", "metaimage")


def test_read_volume_file__slices_in_files_of_their_own(tmp_path):
    """ITK, which reads them, and the check understand the same names."""
    hu = make_hu(0)
    for z, plane in enumerate(hu):
        plane.tofile(tmp_path / f"z{z}.raw")
    (tmp_path / "pattern.mhd").write_text(META + "ElementDataFile = z%d.raw 0 5 1\n")
    (tmp_path / "list.mhd").write_text(META + "ElementDataFile = LIST\n" + "".join(f"z{z}.raw\n" for z in range(6)))
    (tmp_path / "pattern.nhdr").write_text(NRRD + "data file: z%d.raw 0 5 1\n")
    (tmp_path / "list.nhdr").write_text(NRRD + "data file: LIST\n" + "".join(f"z{z}.raw\n" for z in range(6)))
    for name in ("pattern.mhd", "list.mhd", "pattern.nhdr", "list.nhdr"):
        format = "metaimage" if name.endswith("mhd") else "nrrd"
        assert np.array_equal(read_volume_file(tmp_path / name, format, LIMITS).voxels, hu), name
    (tmp_path / "z3.raw").unlink()
    with pytest.raises(VolumeError, match="the file of its voxels is missing"):
        read_volume_file(tmp_path / "list.mhd", "metaimage", LIMITS)


def holds(path, format: str) -> bool:
    volume = read_volume_file(path, format, LIMITS)  # owns the memory of its voxels
    return np.array_equal(volume.voxels, make_hu(0))


@pytest.mark.parametrize("sizes", ["71 64 6", "72 63 6", "72 64 5"])
@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".mha", ".nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_read_volume_file__a_header_that_promises_fewer_voxels_is_refused(tmp_path, ending, packed, sizes):
    header, end = (META, b"ElementDataFile = LOCAL\n") if ending.startswith(".m") else (NRRD, b"\n")
    voxels, place = make_hu(0).tobytes(), tmp_path / f"a{ending}"
    if packed and header is META:
        voxels = zlib.compress(voxels)
        header += f"CompressedData = True\nCompressedDataSize = {len(voxels)}\n"
    elif packed:
        header, voxels = header.replace("raw", "gzip"), gzip.compress(voxels[:9]) + gzip.compress(voxels[9:])
    if ending in (".mhd", ".nhdr"):
        end = b"ElementDataFile = a.raw\n" if header.startswith(META) else b"data file: a.raw\n"
        (tmp_path / "a.raw").write_bytes(voxels)
        voxels = b""
    format = "metaimage" if ending.startswith(".m") else "nrrd"
    place.write_bytes(header.encode() + end + voxels)
    assert holds(place, format)
    place.write_bytes(header.replace("72 64 6", sizes).encode() + end + voxels)
    with pytest.raises(VolumeError, match="goes on behind the last voxel that its header promises"):
        read_volume_file(place, format, LIMITS)


def test_read_volume_file__fewer_voxels_than_in_slices_of_their_own_are_refused(tmp_path):
    for z, plane in enumerate(make_hu(0)):
        plane.tofile(tmp_path / f"z{z}.raw")
    listed = "LIST\n" + "".join(f"z{z}.raw\n" for z in range(6))
    (tmp_path / "a.mhd").write_text(META.replace("72 64 6", "72 64 5") + f"ElementDataFile = {listed}")
    (tmp_path / "a.nhdr").write_text(NRRD.replace("72 64 6", "70 64 6") + f"data file: {listed}")
    for name, format in (("a.mhd", "metaimage"), ("a.nhdr", "nrrd")):
        with pytest.raises(VolumeError, match="goes on behind the last voxel"):
            read_volume_file(tmp_path / name, format, LIMITS)


@pytest.mark.parametrize(
    ("header", "before", "behind"),
    [
        (NRRD + "data file: a.raw\n", b"", bytes(500)),  # padding, less than a plane
        (NRRD + "byte skip: 20000\ndata file: a.raw\n", bytes(20000), b""),
        (NRRD + "line skip: 2\nbyte skip: 3\ndata file: a.raw\n", b"x" * 9000 + b"\n" + b"y" * 9000 + b"\nabc", b""),
        (NRRD + "byteskip: -1\ndata file: a.raw\n", bytes(20000), b""),
        (NRRD.replace("raw", "gzip") + "byte skip: 20000\ndata file: a.raw\n", bytes(20000), b""),
        (META + "HeaderSize = 20000\nElementDataFile = a.raw\n", bytes(20000), b""),
        (META + "HeaderSize = -1\nElementDataFile = a.raw\n", bytes(20000), b""),
        (META + "ElementDataFile = a.raw\n", b"", bytes(500)),
    ],
)
def test_read_volume_file__what_is_skipped_before_the_voxels_is_no_voxel(tmp_path, header, before, behind):
    path = tmp_path / ("a.mhd" if header.startswith(META) else "a.nhdr")
    path.write_text(header)
    data = before + make_hu(0).tobytes() + behind
    (tmp_path / "a.raw").write_bytes(gzip.compress(data) if "gzip" in header else data)
    assert holds(path, "metaimage" if path.suffix == ".mhd" else "nrrd")


def test_read_volume_file__skipped_bytes_count_from_where_each_format_counts(tmp_path):
    voxels = make_hu(0).tobytes()
    nrrd = NRRD + "byte skip: 8000\n\n"
    (tmp_path / "a.nrrd").write_bytes(nrrd.encode() + bytes(8000) + voxels)
    (tmp_path / "a.mha").write_bytes(
        (META + "HeaderSize = 8000\nElementDataFile = LOCAL\n").encode().ljust(8000, b" ") + voxels
    )
    for name, format in (("a.nrrd", "nrrd"), ("a.mha", "metaimage")):
        assert holds(tmp_path / name, format), name


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
@pytest.mark.parametrize("damage", ["flipped", "checksum", "cut", "size"])
def test_metaimage__packed_voxels_that_are_damaged_are_refused(tmp_path, ending, damage):
    """ITK leaves whatever is in its memory where the voxels should be, and says nothing that is heard."""
    packed = bytearray(zlib.compress(make_hu(0).tobytes()))
    said = f"CompressedDataSize = {len(packed) // 2 if damage == 'size' else len(packed)}\n"
    if damage in ("flipped", "checksum"):
        packed[len(packed) // 2 if damage == "flipped" else -2] ^= 255
    if damage == "cut":
        packed = packed[: len(packed) // 2]
        said = f"CompressedDataSize = {len(packed)}\n"
    header = META + "CompressedData = True\n" + said
    place = tmp_path / f"a{ending}"
    if ending == ".mha":
        place.write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + packed)
    else:
        place.write_text(header + "ElementDataFile = a.zraw\n")
        (tmp_path / "a.zraw").write_bytes(packed)
    with pytest.raises(VolumeError, match="truncated or damaged"):
        read_volume_file(place, "metaimage", LIMITS)


def test_metaimage__packed_voxels_behind_the_header_need_their_size(tmp_path):
    """ITK would begin to unpack at the beginning of the file; voxels in a file of their own end with it."""
    header, packed = META + "CompressedData = True\n", zlib.compress(make_hu(0).tobytes())
    (tmp_path / "a.mha").write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + packed)
    with pytest.raises(VolumeError, match="does not say how many bytes"):
        read_volume_file(tmp_path / "a.mha", "metaimage", LIMITS)
    (tmp_path / "a.mhd").write_text(header + "ElementDataFile = a.zraw\n")
    (tmp_path / "a.zraw").write_bytes(packed)
    assert holds(tmp_path / "a.mhd", "metaimage")


@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".mha", ".nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_read_volume_file__what_itk_writes_is_never_too_large(tmp_path, ending, packed):
    image = sitk.GetImageFromArray(np.zeros((4, 200, 200), np.int16))  # packs as tightly as anything can
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"), useCompression=packed)
    format = "metaimage" if ending.startswith(".m") else "nrrd"
    assert read_volume_file(tmp_path / f"a{ending}", format, LIMITS).voxels.shape == (4, 200, 200)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_build__a_changed_file_of_voxels_is_no_finished_corpus(tmp_path, salt_file, ending, capsys):
    write_volume(tmp_path / "in" / f"a{ending}", make_hu(0))
    write_volume(tmp_path / "in" / "b.nii.gz", make_hu(1))
    out = tmp_path / "out"
    assert run_build(tmp_path / "in", out, salt_file, "workers=1") == 0
    assert run_build(tmp_path / "in", out, salt_file, "workers=1") == 0
    (raw,) = (path for path in (tmp_path / "in").iterdir() if ".raw" in path.name)
    data = bytearray(raw.read_bytes())
    data[-1] ^= 1
    raw.write_bytes(data)
    assert run_build(tmp_path / "in", out, salt_file, "workers=1") == 2
    assert "finished corpus of other files" in capsys.readouterr().err


def test_build__a_pipe_is_refused_unread(tmp_path, salt_file):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    os.mkfifo(tmp_path / "in" / "b.nii.gz")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    assert "a pipe, a socket or a device" in rows_by_place(tmp_path / "out")["b.nii.gz"]["reason"]
