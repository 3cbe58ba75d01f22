"""Zip and tar: read as if they were folders, nothing unpacked into one, nothing believed that cannot be."""

import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from meddino_data_curation.cli import main

from meddino.core.errors import VolumeError
from meddino.data.corpus import Corpus
from meddino.volumes import archives
from meddino.volumes.archives import archive_members, files_below, open_file
from meddino.volumes.read import find_series, read_geometry, read_volume
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import enhanced_ct, write_series
from tests.data_curation.test_build import run_build

HU = make_hu(0)


def pack(folder, archive, deflate=True):
    """Pack a folder's files by the archive's ending, last name first."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), reverse=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for path in files:
                packed.add(path, f"./{path.relative_to(folder)}")
    return archive


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz"])
def test_read_volume__a_dicom_series_in_an_archive(tmp_path, ending):
    write_series(tmp_path / "in" / "deeper", HU)
    (tmp_path / "in" / "report.pdf").write_bytes(b"%PDF")
    archive = pack(tmp_path / "in", tmp_path / f"scan.{ending}")
    volume = read_volume(archive)
    assert np.array_equal(volume.voxels, HU)
    assert volume.geometry.matches(read_volume(tmp_path / "in").geometry)
    assert read_geometry(archive).matches(volume.geometry)
    assert np.array_equal(read_volume(archive / "deeper").voxels, HU)
    assert np.array_equal(read_volume(archive / "deeper" / "IM000").voxels[0], HU[0])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_read_volume__a_volume_file_in_an_archive(tmp_path, name, ending):
    plain = write_volume(tmp_path / "in" / name, HU, orientation="RAS")
    archive = pack(tmp_path / "in", tmp_path / f"scan.{ending}")
    volume = read_volume(archive)
    assert np.array_equal(volume.voxels, read_volume(plain).voxels)
    assert volume.geometry.matches(read_volume(plain).geometry)


@pytest.mark.parametrize("packed", [False, True])
def test_find_series__frames_of_one_file_in_a_zip(tmp_path, packed):
    item = enhanced_ct(HU, [3, 0, 5, 1, 4, 2])
    if packed:
        item.compress("1.2.840.10008.1.2.5")
    (tmp_path / "in").mkdir()
    item.save_as(tmp_path / "in" / "enhanced", enforce_file_format=True)
    (found,) = find_series(pack(tmp_path / "in", tmp_path / "scan.zip"))
    assert np.array_equal(found.read().voxels, HU)


def test_read_volume__several_in_an_archive_are_told(tmp_path):
    for seed in (0, 1):
        write_volume(tmp_path / "in" / f"{seed}.nii.gz", make_hu(seed))
    archive = pack(tmp_path / "in", tmp_path / "scans.zip")
    with pytest.raises(VolumeError, match="holds 2 volume files"):
        read_volume(archive)
    assert np.array_equal(read_volume(archive / "1.nii.gz").voxels, make_hu(1))
    with pytest.raises(VolumeError, match="is not in its archive"):
        read_volume(archive / "2.nii.gz")


def test_build_and_explain__archives_beside_files_are_curated_as_folders_are(tmp_path, capsys):
    (tmp_path / "salt").write_text("a salt for tests only")
    for number, ending in enumerate(("zip", "tar", "tgz")):
        write_series(tmp_path / f"{number}", make_hu(number), series=f"s{number}", patient=f"P{number}")
        (tmp_path / "in").mkdir(exist_ok=True)
        pack(tmp_path / f"{number}", tmp_path / "in" / f"scan{number}.{ending}")
    write_volume(tmp_path / "4" / "b.nii.gz", make_hu(4))
    pack(tmp_path / "4", tmp_path / "in" / "more.zip")
    (tmp_path / "in" / "broken.zip").write_bytes(b"PK\3\4")
    assert run_build(tmp_path / "in", tmp_path / "out", tmp_path / "salt", "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    assert {corpus.read(index).tobytes() for index in range(len(corpus))} == {
        plane.tobytes() for seed in (0, 1, 2, 4) for plane in make_hu(seed)
    }
    assert corpus.info["files"] == {
        "DICOM file": 18, "volume file": 1, "unreadable: archive is truncated or damaged": 1,
    }  # fmt: skip
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "in" / "scan2.tgz")]) == 0
    said = capsys.readouterr().out
    assert "6 x DICOM file" in said
    assert "accepted: 6 slices of ct" in said
    assert main(["explain", str(tmp_path / "in" / "more.zip" / "b.nii.gz")]) == 0
    assert "nifti: b.nii.gz" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "in" / "more.zip" / "c.nii.gz")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for info, data in members:
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_archive_members__names_that_lead_out_links_and_doubles_are_told_and_never_followed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret"
    names = ("../secret", "/etc/passwd", "good", "twice", "./twice")
    (tmp_path / "a.tar").write_bytes(tar_of((link, b""), *((tarfile.TarInfo(name), b"x") for name in names)))
    members, problem = archive_members(tmp_path / "a.tar")
    assert problem == ""
    assert {member.name: member.problem for member in members} == {
        "link": "is a link in an archive",
        "__/secret": "its name leads out of its archive",
        "etc/passwd": "its name leads out of its archive",
        "good": "",
        "twice": "its archive has several files of its name",
    }
    assert open_file(tmp_path / "a.tar" / "good").read() == b"x"
    for name in ("link", "../secret", "twice"):
        with pytest.raises(VolumeError):
            open_file(tmp_path / "a.tar" / name)


def test_archive_members__what_cannot_be_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("bomb", bytes(100_000))
        packed.writestr("odd", b"x", zipfile.ZIP_BZIP2)
    data = path.read_bytes()
    index = data.index(b"PK\1\2")
    path.write_bytes(data[: index + 24] + struct.pack("<I", 3 << 30) + data[index + 28 :])
    members, _ = archive_members(path)
    assert [member.problem for member in members] == [
        "its archive says that it unpacks to more than it can hold",
        "is packed in its archive by a method that is not read",
    ]
    monkeypatch.setattr(archives, "_MOST_UNPACKED_BYTES", 1 << 20)
    (tmp_path / "b.tgz").write_bytes(gzip.compress(tar_of((tarfile.TarInfo("a"), bytes(3 << 20)))))
    assert "packed tar holds more than" in archive_members(tmp_path / "b.tgz")[1]


def test_archive_members__a_tar_that_is_cut_off_keeps_what_is_whole_and_says_so(tmp_path):
    write_series(tmp_path / "in", HU)
    archive = pack(tmp_path / "in", tmp_path / "a.tgz")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
    members, problem = archive_members(archive)
    assert problem == "archive is truncated or damaged"
    assert 0 < len(members) < 6
    assert archive in files_below(tmp_path)


def test_open_file__data_damaged_in_a_zip_is_no_volume(tmp_path):
    write_volume(tmp_path / "in" / "a.nii", HU)
    archive = pack(tmp_path / "in", tmp_path / "a.zip", deflate=False)
    data = bytearray(archive.read_bytes())
    data[2000] ^= 1  # one bit: only the checksum knows
    archive.write_bytes(data)
    with pytest.raises(VolumeError, match="truncated or damaged"):
        read_volume(archive)
