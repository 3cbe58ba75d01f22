"""What a user gives to be predicted is found in archives as in folders, and whatever is none is told."""

import os
from pathlib import Path

import numpy as np
import pytest
from meddino_evaluation.data.inputs import Input, find_inputs, refuse_overwriting, write_table

from meddino.core.errors import ConfigError
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


def test_find_inputs__a_generated_name_is_nobody_elses(tmp_path):
    given = [tmp_path / name for name in ("a/scan.nii.gz", "b/scan.nii.gz", "c/scan_2.nii.gz", "d/scan.nii.gz")]
    found = find_inputs([write_volume(path, make_hu(0)) for path in given], tmp_path / "out", 1)
    assert [item.name for item in found] == ["scan", "scan_3", "scan_2", "scan_4"]


def test_find_inputs__an_overlay_is_no_other_pictures_label_map(tmp_path):
    for name in ("x.png", "x_overlay.png"):
        (tmp_path / name).touch()
    found = find_inputs([tmp_path], tmp_path / "out", 1, pictures=True)
    assert [item.name for item in found] == ["x", "x_overlay_2"]


@pytest.mark.parametrize("out", ["scans", "scans/../scans", "alias", "."])
def test_find_inputs__a_folder_within_that_of_the_results_is_refused_by_whatever_path(tmp_path, monkeypatch, out):
    write_volume(tmp_path / "scans/a.nii.gz", make_hu(0))
    (tmp_path / "alias").symlink_to("scans")
    monkeypatch.chdir(tmp_path)
    for given in (Path("scans"), tmp_path / "scans"):
        with pytest.raises(ConfigError, match=r"--out .* holds --input .*scans"):
            find_inputs([given], Path(out), 1)


@pytest.mark.parametrize("link", [False, True])
def test_find_inputs__results_in_the_folder_are_not_taken_for_input(tmp_path, monkeypatch, link):
    write_volume(tmp_path / "scans/a.nii.gz", make_hu(0))
    write_volume(tmp_path / "scans/out/b.nii.gz", make_hu(0))
    (tmp_path / "alias").symlink_to("scans/out")
    monkeypatch.chdir(tmp_path)
    out = Path("alias" if link else "scans/out")
    assert [item.name for item in find_inputs([tmp_path / "scans"], out, 1)] == ["a"]


@pytest.mark.parametrize(
    ("given", "output", "refused"),
    [
        ("scans/a.nii.gz", "scans/a.nii.gz", True),
        ("scans/a.nii.gz", "alias/a.nii.gz", True),
        ("scans/a.png", "scans/a.png", True),
        ("scans/a.nrrd", "scans/a.nii.gz", True),  # a later command would find two files of one case
        ("scans/a.nii.gz", "scans/linked.nii.gz", True),
        ("scans/a.nii.gz", "scans/b.nii.gz", False),
        ("scans/a.nii.gz", "out/a.nii.gz", False),
    ],
)
def test_refuse_overwriting__files_that_were_given(tmp_path, given, output, refused):
    path = tmp_path / given
    path.parent.mkdir()
    path.touch()
    (tmp_path / "alias").symlink_to("scans")
    (tmp_path / "scans/linked.nii.gz").symlink_to(path)
    inputs = [Input("a", (path,), None, "refused")]  # also what is not predicted stays
    if not refused:
        refuse_overwriting(inputs, [tmp_path / output])
        return
    with pytest.raises(ConfigError, match="take the place of the input"):
        refuse_overwriting(inputs, [tmp_path / output])
