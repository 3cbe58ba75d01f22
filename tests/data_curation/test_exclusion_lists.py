"""Whatever people write into a list of held-out things: it is understood, or they are told."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.held_out.exclusion_lists import match_lists, read_list
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.discovery import discover
from pydicom.uid import generate_uid

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import write_series
from tests.data_curation.test_audit import truncated
from tests.data_curation.test_build import run_build

STUDY, SERIES = generate_uid(entropy_srcs=["study of 77"]), generate_uid(entropy_srcs=["77"])


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """A source as people have them; only names are looked at, so the volume files hold nothing."""
    root = tmp_path / "scans" / "x"
    for name in ("sub/f.nii.gz", "sub/g_0000.nii.gz", "Roe, Ann.nii.gz", "Doe, John/s1.nii.gz", "Doe, John/s2.nii.gz"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"-")
    write_series(root / "CT77" / "S1", make_hu(0, (2, 8, 8)), series="77", patient="00731955", StudyInstanceUID=STUDY)
    write_series(root / "CT78" / "S1", make_hu(1, (2, 8, 8)), series="78", patient="P78")
    monkeypatch.chdir(tmp_path / "scans")
    return root


def named_by(hospital: Path, text: str, ending: str = ".txt") -> tuple[set[str], dict]:
    """Return the places that a list of this text names, and what is recorded of it."""
    (hospital.parent / f"list{ending}").write_text(text)
    salt, sources = Salt(b"for tests"), [SourceConfig(name="x", path=hospital)]
    candidates = discover(sources, salt).candidates
    lists = [read_list(hospital.parent / f"list{ending}", "list-1")]
    named, (outcome,) = match_lists(lists, candidates, sources, salt)
    places = {
        item.source_path if item.format != "dicom" else item.files[0].parent.parent.name
        for item in candidates
        if item.volume_id in named
    }
    return places, {**outcome.entry, "unmatched": outcome.unmatched}


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("{root}/sub/f.nii.gz", "sub/f.nii.gz"),
        ("x/sub/f.nii.gz", "sub/f.nii.gz"),
        ("./sub/f.nii.gz", "sub/f.nii.gz"),
        ("sub/f.nii.gz", "sub/f.nii.gz"),
        ("../scans/x/sub//f.nii.gz", "sub/f.nii.gz"),
        ("sub/f", "sub/f.nii.gz"),
        ("sub\\f.nii.gz", "sub/f.nii.gz"),
        ("f.nii.gz  # withdrawn", "sub/f.nii.gz"),
        ("g.nii.gz", "sub/g_0000.nii.gz"),
        ("g", "sub/g_0000.nii.gz"),
        ("f_0000.nii.gz", "sub/f.nii.gz"),
        ("f.nrrd", "sub/f.nii.gz"),
        ("Roe, Ann.nii.gz", "Roe, Ann.nii.gz"),
        ("Roe, Ann", "Roe, Ann.nii.gz"),
        ('"Doe, John/s1.nii.gz"', "Doe, John/s1.nii.gz"),
        ("CT77/S1/IM000", "CT77"),
        ("{root}/CT77/S1/IM001", "CT77"),
        ("{root}/CT77", "CT77"),
        ("CT77/", "CT77"),
        (STUDY, "CT77"),
        (SERIES, "CT77"),
        ("00731955", "CT77"),
        ("731955", "CT77"),
        ("p-78", "CT78"),
    ],
)
def test_match_lists__one_volume_by_each_way_of_naming_it(hospital, line, place):
    places, entry = named_by(hospital, line.format(root=hospital) + "\n")
    assert places == {place}
    assert (entry["lines"], entry["matched"], entry["unmatched"]) == (1, 1, ())


def test_match_lists__a_folder_names_all_below_it(hospital):
    assert named_by(hospital, "Doe, John")[0] == {"Doe, John/s1.nii.gz", "Doe, John/s2.nii.gz"}
    assert len(named_by(hospital, str(hospital))[0]) == 7


def test_match_lists__paths_through_a_link_and_behind_it(hospital, tmp_path):
    (tmp_path / "link").symlink_to(hospital)
    assert named_by(hospital, f"{tmp_path}/link/sub/f.nii.gz")[0] == {"sub/f.nii.gz"}
    assert named_by(tmp_path / "link", f"{os.path.realpath(hospital)}/sub/f.nii.gz")[0] == {"sub/f.nii.gz"}


@pytest.mark.parametrize(
    "line", ["Roe", "su", "h.nii.gz", "sub/f.nii.gz.bak", "IM000", "..", ".", "/", "1.2.3", "78", "/x", "X"]
)
def test_match_lists__what_names_nothing_is_counted(hospital, line):
    places, entry = named_by(hospital, f"# all of them\n\n{line}\n")
    assert places == set()
    assert (entry["lines"], entry["matched"], entry["volumes"], entry["unmatched"]) == (1, 0, 0, (line,))


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".csv", 'patient,split\n00731955,test\n"Roe, Ann.nii.gz",test\n'),
        (".csv", "patient;split\n731955;test\nRoe, Ann.nii.gz;test\n"),
        (".tsv", "patient\tsplit\n00731955\ttest\nRoe, Ann.nii.gz\ttest\n"),
        (".txt", "\ufeffpatients\r\n00731955\r\nRoe, Ann.nii.gz\r\n"),
    ],
)
def test_match_lists__first_column_of_tables(hospital, ending, text):
    places, entry = named_by(hospital, text, ending)
    assert places == {"CT77", "Roe, Ann.nii.gz"}
    assert (entry["lines"], entry["matched"], entry["volumes"]) == (3, 2, 2)


def test_build__a_list_is_recorded_by_counts_and_its_lines_stay_in_the_private_folder(tmp_path, salt_file, capsys):
    for seed in range(3):
        write_volume(tmp_path / "in" / f"case_{seed}.nii.gz", make_hu(seed, (10, 64, 72)))
    write_volume(tmp_path / "in" / "another_name.mha", make_hu(0, (10, 64, 72)))
    (tmp_path / "list.txt").write_text("case_0\nGertrude Untraceable\n")
    arguments = ("workers=1", "--exclude", str(tmp_path / "list.txt"))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 0
    log = capsys.readouterr().err
    assert "1 of 2 lines match" in " ".join(log.split())
    assert "Gertrude" not in log
    reasons = sorted(row["reason"] for row in Corpus(tmp_path / "out").volumes.to_pylist() if row["status"] == "rejected")
    # The copy under another name is the same scan.
    assert reasons == ["held out: named by an exclusion list", "held out: the same scan is named by an exclusion list"]
    (entry,) = Corpus(tmp_path / "out").info["exclusion_lists"]
    assert {name: entry[name] for name in ("lines", "matched", "volumes")} == {"lines": 2, "matched": 1, "volumes": 1}
    assert "Gertrude Untraceable" in (tmp_path / "out.private" / "unmatched_lines.txt").read_text()
    assert (tmp_path / "out.private" / "unmatched_lines.txt").stat().st_mode & 0o077 == 0
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"Gertrude" in text for text in texts)
    assert b"list-1: 1 of 2 lines matched, 1 volumes left out" in (tmp_path / "out" / "report.html").read_bytes()
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "left out by lists: list-1: 1 of 2 lines matched" in " ".join(capsys.readouterr().out.split())


def test_build__a_listed_volume_that_cannot_be_read_is_told(tmp_path, salt_file, capsys):
    """Nobody can say whether a copy of it is there under another name."""
    write_volume(tmp_path / "in" / "case_0.nii.gz", make_hu(0))
    truncated(tmp_path / "in" / "case_1.nii.gz")
    write_volume(tmp_path / "elsewhere" / "x.nii.gz", make_hu(2))
    (tmp_path / "list.txt").write_text(f"case_1\n{tmp_path}/elsewhere\n")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1", "--exclude", str(tmp_path / "list.txt")) == 0
    log = " ".join(capsys.readouterr().err.split())
    assert "1 of them are files or folders outside the sources: give those to --exclude" in log
    assert "1 volumes left out, 1 of them COULD NOT BE READ" in log
    (row,) = [row for row in Corpus(tmp_path / "out").volumes.to_pylist() if row["status"] == "rejected"]
    assert row["reason"] == "held out: named by an exclusion list"


@pytest.mark.parametrize("text", ["case_9\nsub/nothing.nii.gz\n", "# nothing yet\n"])
def test_build__a_list_that_names_nothing_is_an_error_unless_allowed(tmp_path, salt_file, capsys, text):
    write_volume(tmp_path / "in" / "case_0.nii.gz", make_hu(0))
    (tmp_path / "list.txt").write_text(text)
    arguments = ("workers=1", "--exclude", str(tmp_path / "list.txt"))
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "exclusion.allow_unmatched_lists=true" in line
    assert "nothing.nii.gz" not in line
    assert not (tmp_path / "out").exists()
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *arguments, "exclusion.allow_unmatched_lists=true") == 0
    (entry,) = json.loads((tmp_path / "out" / "corpus.json").read_text())["exclusion_lists"]
    assert (entry["matched"], entry["volumes"]) == (0, 0)


def test_match_lists__the_hash_of_a_list_needs_the_salt(hospital):
    """Whoever has the corpus could try all short ids against a plain hash."""
    (hospital.parent / "list.txt").write_text("P78\n")
    lists, sources = [read_list(hospital.parent / "list.txt", "list-1")], [SourceConfig(name="x", path=hospital)]
    hashes = [match_lists(lists, [], sources, Salt(salt))[1][0].entry["hash"] for salt in (b"one", b"one", b"two")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_match_lists__numbered_names_are_as_many_people_and_files_in_archives_are_named_too(hospital):
    for number in range(1, 7):
        (hospital / f"word_{number:04d}.nii.gz").write_bytes(b"-")
    with zipfile.ZipFile(hospital / "more.zip", "w") as packed:
        packed.writestr("deep/case_8.nii.gz", b"-")
        packed.writestr("deep/case_9.nii.gz", b"-")
    assert named_by(hospital, "word_0003\n")[0] == {"word_0003.nii.gz"}
    assert named_by(hospital, "more.zip/deep/case_8.nii.gz\n")[0] == {"more.zip/deep/case_8.nii.gz"}
    assert named_by(hospital, "case_9\n")[0] == {"more.zip/deep/case_9.nii.gz"}
