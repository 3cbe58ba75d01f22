"""One run over everything that is wrong with files: each has its reason, and the good volume comes through."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.config import HounsfieldConfig
from meddino_data_curation.selection.hounsfield import recognise_hounsfield

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import ct_slice, write_series
from tests.data_curation.test_build import run_build
from tests.data_curation.test_held_out import rows_by_place


def nifti_header(size: tuple[int, ...], datatype: int = 4, bits: int = 16) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(size), *size, *([1] * (7 - len(size))))
    struct.pack_into("<hh", header, 70, datatype, bits)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    return bytes(header)


def _bad_files(root: Path) -> dict[str, str]:
    """Write them and return file name to what its reason must say."""
    good = root / "sub folder" / "Größe 大小.nii.gz"
    write_volume(good, make_hu(0))
    packed = good.read_bytes()
    (root / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    (root / "empty.nii.gz").write_bytes(b"")
    (root / "text.nii.gz").write_text("this is no image")
    (root / "nifti.nrrd").write_bytes(gzip.decompress(packed))
    (root / "huge.nii").write_bytes(nifti_header((30000, 30000, 30000)))
    (root / "long.nii").write_bytes(nifti_header((20000, 4, 4)))
    (root / "promises.nii").write_bytes(nifti_header((2000, 2000, 200)))
    with gzip.open(root / "bomb.nii.gz", "wb", compresslevel=9) as stream:
        stream.write(nifti_header((2048, 2048, 4096)))
        stream.write(bytes(8 << 20))
    (root / "zero axis.nii").write_bytes(nifti_header((0, 64, 64)))
    (root / "named.dcm").write_bytes(b"not DICOM at all" * 40)
    values = make_hu(1).astype(np.float32)
    values[2, 3, 4] = np.nan
    write_volume(root / "nan.nii.gz", values)
    write_volume(root / "four.nii.gz", make_hu(1))
    four = sitk.JoinSeries([sitk.ReadImage(str(root / "four.nii.gz"))] * 3)
    sitk.WriteImage(four, str(root / "four.nii.gz"))
    write_volume(root / "mask.nii.gz", (make_hu(2) > 0).astype(np.uint8))
    write_volume(root / "unit.nii.gz", ((make_hu(2) + 1024) / 2048).astype(np.float32))
    write_volume(root / "byte.nii.gz", np.clip((make_hu(2) + 1024) / 8, 0, 255).astype(np.uint8))
    write_volume(root / "mri.nii.gz", (np.abs(make_hu(2).astype(np.int32) + 1000) // 2 + 7).astype(np.int16)[:, ::2, ::2])
    write_volume(root / "small.nii.gz", make_hu(2)[:, 20:50, 20:50])
    return {
        "truncated.nii.gz": "truncated or damaged", "empty.nii.gz": "file is empty", "text.nii.gz": "is none",
        "nifti.nrrd": "named as NRRD and holds NIfTI", "huge.nii": "limits.max_axis_px", "long.nii": "limits.max_axis_px",
        "promises.nii": "cannot hold", "bomb.nii.gz": "limits.max_volume_voxels", "zero axis.nii": "",
        "named.dcm": "named as DICOM", "nan.nii.gz": "1 voxels are NaN", "four.nii.gz": "3 time points",
        "mask.nii.gz": "label map", "unit.nii.gz": "scaled to",
        "byte.nii.gz": "8-bit", "mri.nii.gz": "not in HU", "small.nii.gz": "slices.min_size_px",
    }  # fmt: skip


def test_build__every_bad_file_has_its_reason_and_the_run_goes_on(tmp_path, salt_file, capsys):
    source = tmp_path / "in"
    reasons = _bad_files(source)
    (source / "loop").symlink_to(source, target_is_directory=True)
    (source / "dangling.nii").symlink_to(tmp_path / "nowhere")
    more = ("workers=1", "limits.max_rejected_fraction=1")
    assert run_build(source, tmp_path / "out", salt_file, *more) == 0
    rows = rows_by_place(tmp_path / "out")
    assert rows["sub folder/Größe 大小.nii.gz"]["status"] == "accepted"
    for name, words in reasons.items():
        assert rows[name]["status"] == "rejected", name
        assert words in rows[name]["reason"], (name, rows[name]["reason"])
    assert "no such file" in rows["dangling.nii"]["reason"]
    assert len(rows) == len(reasons) + 2  # the loop of links adds nothing
    assert len(Corpus(tmp_path / "out")) == 6
    assert "Traceback" not in capsys.readouterr().err


def test_find_files__no_permission_is_a_reason(tmp_path, monkeypatch):
    from meddino_data_curation.config import SourceConfig
    from meddino_data_curation.sources.candidates import find_files

    write_volume(tmp_path / "a.nii.gz", make_hu(0))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.nii.gz") and real(path, mode))
    (found,) = find_files(SourceConfig(name="test", path=tmp_path))
    assert found.problem == "file cannot be read: no permission"


@pytest.mark.parametrize("swap", [False, True])
def test_build__byte_orders_read_alike(tmp_path, salt_file, swap):
    hu = make_hu(0)
    header = nifti_header(hu.shape[::-1])
    if swap:
        header = bytearray(header)
        for offset, kind in ((0, "i"), (40, "8h"), (70, "hh"), (76, "8f"), (108, "f")):
            struct.pack_into(f">{kind}", header, offset, *struct.unpack_from(f"<{kind}", header, offset))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii").write_bytes(bytes(header) + hu.astype(">i2" if swap else "<i2").tobytes())
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    read = {corpus.read(index).tobytes() for index in range(len(corpus))}
    flipped = hu[:, ::-1, ::-1]  # without sform and qform NIfTI's axes run to the right and to the front
    assert read in ({plane.tobytes() for plane in hu}, {np.ascontiguousarray(plane).tobytes() for plane in flipped})


def test_recognise_hounsfield__stored_values_are_repaired_or_refused():
    stored = make_hu(0).astype(np.int32) + 1024
    assert recognise_hounsfield(stored, HounsfieldConfig()).offset == -1024
    with pytest.raises(Exception, match="stored values without rescale"):
        recognise_hounsfield(stored, HounsfieldConfig(repair_stored_values=False))
    assert recognise_hounsfield(make_hu(0), HounsfieldConfig()).offset == 0
    assert recognise_hounsfield(np.clip(make_hu(0), -160, 240), HounsfieldConfig()).offset == 0
    assert recognise_hounsfield(stored, HounsfieldConfig(check=False)).offset == 0


def test_build__damaged_dicom_without_ending_is_a_row_each(tmp_path, salt_file, capsys):
    """Nothing of a folder of DICOM files goes without a word: cut headers, empty files, what cannot be opened."""
    hu = make_hu(0, (8, 64, 72))
    folder = tmp_path / "in" / "series"
    paths = write_series(folder, hu)
    for path, length in zip(paths, (0, 150, 400, 700), strict=False):
        path.write_bytes(path.read_bytes()[:length])
    (folder / "notes.txt").write_bytes(b"")
    (folder / "remarks").write_text("written by hand")
    (tmp_path / "in" / "elsewhere").mkdir()
    (tmp_path / "in" / "elsewhere" / "nothing").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "limits.max_rejected_fraction=1") == 0
    rows = Corpus(tmp_path / "out").volumes.to_pylist()
    assert [row["shape"] for row in rows if row["status"] == "accepted"] == [[4, 64, 72]]
    refused = sorted(row["reason"] for row in rows if row["status"] == "rejected")
    assert refused == [
        "DICOM: header is truncated or damaged",
        "DICOM: no pixels, or its header is truncated",
        "DICOM: not a CT image but an unknown kind of object",
        "file cannot be read: it is a pipe, a socket or a device",
        "file is empty",
    ]
    counts = Corpus(tmp_path / "out").info["files"]
    assert counts == {
        "DICOM file": 6,
        "other": 2,
        "unreadable: DICOM: header is truncated or damaged": 1,
        "unreadable: file cannot be read: it is a pipe, a socket or a device": 1,
        "unreadable: file is empty": 2,
    }
    assert "4 files could not be used" in capsys.readouterr().err
    assert "unreadable: file is empty" in (tmp_path / "out" / "report.html").read_text()


def test_build__volumes_without_ending_are_read_and_formats_that_are_not_are_counted(tmp_path, salt_file, capsys):
    source = tmp_path / "in"
    for seed, name in enumerate(("a.nii", "b.nii.gz", "c.nrrd", "d.mha", "e.nrrd")):
        path = write_volume(source / name, make_hu(seed))
        path.rename(source / (f"{name[0]} without" if name[0] != "e" else "e.nrrd.gz"))
    (source / "e.nrrd.gz").write_bytes(gzip.compress((source / "e.nrrd.gz").read_bytes()))
    (source / "f.hdr").write_bytes(nifti_header((72, 64, 6)).replace(b"n+1\0", b"ni1\0"))
    (source / "f.img").write_bytes(make_hu(5).tobytes())
    (source / "g.zip").write_bytes(b"PK\3\4")
    (source / "h").write_bytes(gzip.compress(b"something"))
    (source / "i").write_bytes(gzip.compress((source / "c without").read_bytes()))
    ct_slice(make_hu(6)[2], 0.0).save_as(source / "old scanner.img", enforce_file_format=True)
    assert run_build(source, tmp_path / "out", salt_file, "workers=1") == 0
    corpus = Corpus(tmp_path / "out")
    assert {corpus.read(index).tobytes() for index in range(len(corpus))} == {
        *(plane.tobytes() for seed in range(4) for plane in make_hu(seed)),
        make_hu(6)[2].tobytes(),
    }
    assert corpus.info["files"] == {
        "DICOM file": 1,
        "not read: Analyze or NIfTI in two files (.hdr, .img)": 2,
        "not read: NRRD or MetaImage packed as a whole": 1,
        "not read: an archive, or packed": 1,
        "other": 1,
        "unreadable: archive is truncated or damaged": 1,
        "volume file": 4,
    }
    assert "5 files could not be used" in capsys.readouterr().err


def test_build__only_files_that_are_not_read_are_named(tmp_path, salt_file, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "f.hdr").write_bytes(b"\0" * 348)
    (tmp_path / "in" / "g").write_bytes(b"")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file) == 2
    said = capsys.readouterr().err
    assert "1 x not read: Analyze or NIfTI in two files (.hdr, .img)" in said
    assert "1 x unreadable: file is empty" in said
