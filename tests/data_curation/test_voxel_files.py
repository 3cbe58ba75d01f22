"""Headers whose voxels lie in files of their own: what they promise, where they point, and when those files change."""

import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.config import CurationConfig

from meddino.core.errors import VolumeError
from meddino.volumes.formats.itk import read_volume_file
from meddino.volumes.formats.voxel_files import find_voxel_files
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
