"""What a user gives to be predicted is found in archives as in folders, and whatever is none is told."""

import os

import numpy as np
from meddino_evaluation.data.inputs import find_inputs, write_table

from meddino.volumes.file_kinds import VOLUME_SUFFIXES
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import write_series
from tests.volumes.test_archives import pack


def test_find_inputs__volumes_and_series_in_archives(tmp_path):
    write_series(tmp_path / "a" / "series", make_hu(0))
    write_volume(tmp_path / "b" / "scan_0000.nii.gz", make_hu(1))
    (tmp_path / "b" / "notes.txt").write_text("no volume")
    given = tmp_path / "given"
    given.mkdir()
    pack(tmp_path / "a", given / "one.zip")
    pack(tmp_path / "b", given / "two.tgz")
    (given / "broken.zip").write_bytes(b"PK")
    found = {item.name: item for item in find_inputs([given], tmp_path / "out", 1)}
    assert {name: item.reason for name, item in found.items()} == {
        "two.tgz/scan": "",
        "one.zip/series": "",
        "broken.zip": "archive is truncated or damaged",
        "two.tgz/notes.txt": "no volume and no slice of a series",
    }
    assert np.array_equal(found["one.zip/series"].read()[0].voxels, make_hu(0))
    assert np.array_equal(found["two.tgz/scan"].read()[0].voxels, make_hu(1))
    (alone,) = find_inputs([given / "one.zip"], tmp_path / "out", 1)
    assert np.array_equal(alone.read()[0].voxels, make_hu(0))


def test_write_table__names_in_bytes_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"M\xfcller.nii.gz")
    write_volume(tmp_path / "a.nii.gz", make_hu(0)).rename(tmp_path / name)
    write_table(tmp_path / "table.csv", find_inputs([tmp_path], tmp_path / "out", 1))
    assert "M\\udcfcller," in (tmp_path / "table.csv").read_text()


def test_find_inputs__two_files_of_one_case_are_refused_by_name(tmp_path):
    for name in ("a.nii", "a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, make_hu(0))
    found = find_inputs([tmp_path], tmp_path / "out", 1)
    became = {item.files[0].name: item.status for item in found}
    assert became == {"a.nii": "refused", "a.nii.gz": "refused", "b.nii.gz": ""}
    assert "a.nii and a.nii.gz" in found[0].reason and found[0].reason == found[1].reason


def test_find_inputs__takes_every_format_that_is_read(tmp_path):
    for number, ending in enumerate(VOLUME_SUFFIXES):
        write_volume(tmp_path / f"{number}{ending}", make_hu(0))
    taken = {item.name for item in find_inputs([tmp_path], tmp_path / "out", 1) if item.status == ""}
    assert taken == {str(number) for number in range(len(VOLUME_SUFFIXES))}
