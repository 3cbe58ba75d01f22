"""Held-out data in a build: whole patients go, what is wrong with it is told first, and it is read once."""

import json

import numpy as np
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.held_out import scan as scan_module

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import write_series
from tests.data_curation.test_audit import truncated
from tests.data_curation.test_build import run_build, tree
from tests.data_curation.test_held_out import rows_by_place

SHAPE = (10, 64, 72)


def test_exclude__a_copy_goes_with_the_copy_that_has_the_id(tmp_path, salt_file):
    """The NIfTI copy is preferred, the DICOM original knows the patient, another scan of whom is held out."""
    write_volume(tmp_path / "in" / "sub" / "scan.nii.gz", make_hu(0, SHAPE))
    write_series(tmp_path / "in" / "dicom", make_hu(0, SHAPE)[:8], patient="PAT-000123", series="one", StudyInstanceUID="1.1")
    write_volume(tmp_path / "in" / "other.nii.gz", make_hu(1, SHAPE))
    write_series(tmp_path / "held", make_hu(2, SHAPE), patient="PAT-000123", series="two", StudyInstanceUID="1.2")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "--exclude", str(tmp_path / "held")) == 0
    kept = [place for place, row in rows_by_place(tmp_path / "out").items() if row["status"] == "accepted"]
    assert kept == ["other.nii.gz"]
    assert main(["audit", str(tmp_path / "out"), "--salt-file", str(salt_file), "--against", str(tmp_path / "held")]) == 0


def test_exclude__a_held_out_scan_without_an_id_takes_the_patients_other_scans_along(tmp_path, salt_file):
    for seed, series in enumerate(("venous", "arterial")):
        write_series(tmp_path / "in" / series, make_hu(seed, SHAPE), patient="P7", series=series, StudyInstanceUID=f"1.{seed}")
    write_volume(tmp_path / "in" / "other.nii.gz", make_hu(5, SHAPE))
    write_volume(tmp_path / "imagesTs" / "case_0001_0000.nii.gz", make_hu(0, SHAPE)[:, ::-1])
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "--exclude", str(tmp_path / "imagesTs")) == 0
    reasons = sorted(row["reason"] or "" for row in Corpus(tmp_path / "out").volumes.to_pylist())
    assert reasons == [
        "", "held out: the same patient is in the excluded data", "held out: the same scan is in the excluded data"
    ]  # fmt: skip
    (entry,) = Corpus(tmp_path / "out").info["audit"]
    assert entry["left_out"] == 2


def test_exclude__a_patient_pattern_and_same_ids(tmp_path, salt_file):
    write_series(tmp_path / "in" / "a", make_hu(0, SHAPE), patient="P7")
    write_volume(tmp_path / "in" / "other.nii.gz", make_hu(5, SHAPE))
    write_volume(tmp_path / "held" / "P7" / "scan.nii.gz", make_hu(1, SHAPE))
    how = ("exclusion.patient_pattern=^([^/]+)/", "exclusion.same_ids=true")
    arguments = ("workers=1", "--exclude", str(tmp_path / "held"), *how)
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 0
    assert Corpus(tmp_path / "out").info["totals"] | {"shard_bytes": 0} == {
        "volumes": 2, "accepted": 1, "rejected": 1, "duplicate": 0, "erased": 0, "slices": 10, "shard_bytes": 0
    }  # fmt: skip
    assert "P7" not in (tmp_path / "out" / "corpus.json").read_text()


def _empty(root):
    (root / "held").mkdir()
    return [root / "held"]


def _splits(root):
    (root / "splits.json").write_text("[]")
    return [root / "splits.json"]


def _truncated(root):
    return [truncated(root / "held" / "y.nii.gz").parent]


def _partly(root):
    write_volume(root / "held" / "x.nii.gz", make_hu(50))
    return _truncated(root)


def _labels(root):
    write_volume(root / "held" / "x.nii.gz", (make_hu(50) > 0).astype(np.uint8))
    return [root / "held"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_empty, "no CT volume under"),
        (_splits, "held-out data is a folder of volumes or pictures, a corpus"),
        (_truncated, "none of 1 volumes could be used, so nothing was compared"),
        (_partly, "1 of 2 volumes could not be read"),
        (_labels, "none of 1 volumes could be used"),
    ],
)
def test_exclude__what_is_wrong_with_it_is_told_before_anything_is_curated(tmp_path, salt_file, capsys, prepare, words):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    exclude = [word for path in prepare(tmp_path) for word in ("--exclude", str(path))]
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", *exclude) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    assert not list(tmp_path.glob("out/.work/volumes/*/*"))


def test_exclude__an_empty_folder_stops_a_part_too(tmp_path, salt_file, capsys):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    (tmp_path / "held").mkdir()
    arguments = ("workers=1", "--part", "1/2", "--exclude", str(tmp_path / "held"))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 2
    assert "no CT volume under" in capsys.readouterr().err


def test_exclude__unread_volumes_may_be_accepted_and_are_counted(tmp_path, salt_file, capsys):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    _partly(tmp_path)
    arguments = ("workers=1", "--exclude", str(tmp_path / "held"), "exclusion.allow_unread=true")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 0
    (entry,) = Corpus(tmp_path / "out").info["audit"]
    assert (entry["volumes"], entry["unread"]) == (1, 1)
    assert "1 MORE COULD NOT BE READ" in " ".join(capsys.readouterr().err.split())


def test_exclude__held_out_data_is_read_once_whatever_happens_later(tmp_path, salt_file, monkeypatch):
    from meddino_data_curation.corpus import build as build_module

    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    write_volume(tmp_path / "held" / "x.nii.gz", make_hu(50))
    arguments = ("workers=1", "--exclude", str(tmp_path / "held"))
    assert run_build(tmp_path / "in", tmp_path / "whole", salt_file, *arguments) == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "finish", killed)
        assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 130
    monkeypatch.setattr(scan_module, "run_volumes", killed)
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_build__killed_before_its_last_note_knows_its_corpus(tmp_path, salt_file, monkeypatch, capsys):
    from meddino_data_curation.corpus.work_folder import WorkFolder

    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 130
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    assert "finished already" in capsys.readouterr().err
    assert not (tmp_path / "out" / ".work").exists()


def test_exclude__two_held_out_sets_of_one_name_are_refused(tmp_path, salt_file, capsys):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"held_out": [{"name": "excluded-1", "path": str(tmp_path / "in")}]}))
    arguments = ("--exclude", str(tmp_path / "in"), "--config", str(config))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 2
    assert "two held-out sets are called 'excluded-1'" in capsys.readouterr().err
