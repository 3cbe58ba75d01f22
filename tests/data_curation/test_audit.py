"""An audit says what it compared and what it could not: it never looks like an all-clear that it is not."""

import json
import shutil
from pathlib import Path

import pytest
from meddino_data_curation.cli import main

from meddino.data.content import ContentHash
from meddino.data.corpus import Corpus
from tests.data.tiny_corpus import write_corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import write_series

SHAPE = (10, 64, 72)


@pytest.fixture(scope="module")
def built(tmp_path_factory, salt_file) -> Path:
    """A corpus of a DICOM patient PAT-000123, of a NIfTI case_0001, and of a DICOM patient P7."""
    root = tmp_path_factory.mktemp("audited")
    write_series(root / "in" / "a", make_hu(0, SHAPE), series="a", patient="PAT-000123", StudyInstanceUID="1.2.1")
    write_series(root / "in" / "b", make_hu(1, SHAPE), series="b", patient="P7", StudyInstanceUID="1.2.2")
    write_volume(root / "in" / "case_0001.nii.gz", make_hu(2, SHAPE))
    out = root / "corpus"
    assert main(["build", str(root / "in"), "--out", str(out), "workers=1", f"privacy.salt_file={salt_file}"]) == 0
    return out


@pytest.fixture
def corpus(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "corpus")


def run_audit(corpus: Path, salt_file: Path | None, *arguments: object) -> int:
    salt = ["--salt-file", str(salt_file)] if salt_file else []
    return main(["audit", str(corpus), *salt, "--against", *map(str, arguments)])


def truncated(path: Path, seed: int = 9) -> Path:
    write_volume(path, make_hu(seed, SHAPE))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def test_audit__of_what_cannot_be_read_is_an_error_and_no_audit(corpus, salt_file, tmp_path, capsys):
    truncated(tmp_path / "testset" / "y.nii.gz")
    assert run_audit(corpus, salt_file, tmp_path / "testset", "--name", "testset") == 2
    printed = capsys.readouterr()
    assert "testset: none of 1 volumes could be used, so nothing was compared" in printed.err
    assert "testset: 1 MORE COULD NOT BE READ" in printed.out
    assert Corpus(corpus).info["audit"] == []
    assert run_audit(corpus, salt_file, tmp_path / "testset", "--allow-unread") == 2
    capsys.readouterr()
    assert main(["show", str(corpus)]) == 0
    assert "audited against: nothing" in capsys.readouterr().out


def test_audit__volumes_that_cannot_be_read_are_counted_and_accepted_only_by_option(corpus, salt_file, tmp_path, capsys):
    write_volume(tmp_path / "testset" / "x.nii.gz", make_hu(50, SHAPE))
    truncated(tmp_path / "testset" / "y.nii.gz")
    (tmp_path / "testset" / "more.zip").write_bytes(b"PK")
    write_volume(tmp_path / "testset" / "mask.nii.gz", (make_hu(50, SHAPE) > 0).astype("uint8"))
    write_series(tmp_path / "testset" / "scout", make_hu(51, (1, 64, 72)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "testset" / "mr", make_hu(52, (1, 64, 72)), series="mr", Modality="MR")
    assert run_audit(corpus, salt_file, tmp_path / "testset", "--name", "t") == 2
    printed = capsys.readouterr()
    assert "t: 0 overlaps with 1 volumes" in printed.out
    assert "t: 2 MORE COULD NOT BE READ" in printed.out
    assert "t: 3 are no CT" in printed.out
    assert "--allow-unread" in printed.err
    assert run_audit(corpus, salt_file, tmp_path / "testset", "--name", "t", "--allow-unread") == 0
    (entry,) = Corpus(corpus).info["audit"]
    assert (entry["volumes"], entry["unread"], entry["no_ct"]) == (1, 2, 3)
    capsys.readouterr()
    assert main(["show", str(corpus)]) == 0
    assert "audited against t: 0 overlaps with 1 volumes; 2 MORE COULD NOT BE READ" in " ".join(capsys.readouterr().out.split())
    assert "could not be read: scans of them may be in this corpus" in (corpus / "report.html").read_text()


def test_audit__a_volume_that_cannot_be_read_still_has_its_patient(corpus, salt_file, tmp_path, capsys):
    truncated(tmp_path / "imagesTs" / "PAT-000123_0000.nii.gz")
    assert run_audit(corpus, salt_file, tmp_path / "imagesTs", "--name", "t") == 2
    assert "is by patient" in capsys.readouterr().out
    (entry,) = Corpus(corpus).info["audit"]
    assert entry["overlaps_by_kind"] == {"patient": 1}


def test_audit__an_id_in_a_file_name_meets_the_one_in_a_header(corpus, salt_file, tmp_path, capsys):
    write_volume(tmp_path / "imagesTs" / "PAT-000123_0000.nii.gz", make_hu(60, SHAPE))
    assert run_audit(corpus, salt_file, tmp_path / "imagesTs", "--name", "t") == 2
    printed = capsys.readouterr().out
    assert "is by patient" in printed
    # One of the corpus's three volumes has an id that means the same elsewhere.
    assert "t: only in part by patient: 2 of the corpus's 3 volumes lack an id" in printed
    assert "t: NOT by series, study: no volume of it has DICOM UIDs" in printed
    (entry,) = Corpus(corpus).info["audit"]
    assert entry["compared"] == {"exact": 1, "near": 1, "series": 0, "study": 0, "patient": 1}


def test_audit__ids_of_a_duplicate_count_for_the_copy_that_is_kept(salt_file, tmp_path, capsys):
    write_volume(tmp_path / "in" / "sub" / "scan.nii.gz", make_hu(0, SHAPE))
    write_series(tmp_path / "in" / "dicom", make_hu(0, SHAPE)[:8], patient="PAT-000123", StudyInstanceUID="1.1")
    command = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "workers=1", f"privacy.salt_file={salt_file}"]
    assert main(command) == 0
    assert sorted(Corpus(tmp_path / "out").volumes.column("status").to_pylist()) == ["accepted", "duplicate"]
    write_series(tmp_path / "held", make_hu(60, SHAPE), patient="PAT-000999", series="other", StudyInstanceUID="1.2")
    assert run_audit(tmp_path / "out", salt_file, tmp_path / "held", "--name", "t") == 0
    printed = capsys.readouterr().out
    assert "t: compared by exact (1), near (1), series (1), study (1), patient (1)" in printed
    assert "only in part by near" not in printed


def test_audit__without_the_salt_says_that_patients_were_not_compared(corpus, tmp_path, capsys):
    write_series(tmp_path / "dicom", make_hu(60, SHAPE), patient="PAT-000123")
    assert run_audit(corpus, None, tmp_path / "dicom", "--name", "t") == 0
    why = "NOT by series, study, patient: the corpus's salt is not at hand (<corpus>.private/salt, or --salt-file)"
    assert f"t: {why}" in capsys.readouterr().out
    assert set(Corpus(corpus).info["audit"][0]["not_compared"]) == {"series", "study", "patient"}
    assert main(["show", str(corpus)]) == 0
    assert why in " ".join(capsys.readouterr().out.split())


def test_audit__against_a_corpus_with_another_salt_says_so(corpus, built, salt_file, tmp_path, capsys):
    (tmp_path / "salt").write_text("quite another salt")
    write_series(tmp_path / "dicom", make_hu(60, SHAPE), patient="PAT-000123")
    command = ["build", str(tmp_path / "dicom"), "--out", str(tmp_path / "other"), "workers=1"]
    assert main([*command, f"privacy.salt_file={tmp_path / 'salt'}"]) == 0
    assert run_audit(corpus, salt_file, tmp_path / "other", "--name", "t") == 0
    assert "t: NOT by series, study, patient: it is a corpus with another salt" in capsys.readouterr().out


def test_audit__a_corpus_of_an_earlier_version_says_that_patients_were_not_compared(corpus, salt_file, tmp_path, capsys):
    info = json.loads((corpus / "corpus.json").read_text())
    del info["patient_ids"]
    (corpus / "corpus.json").write_text(json.dumps(info))
    write_series(tmp_path / "dicom", make_hu(60, SHAPE), patient="PAT-000123", series="other", StudyInstanceUID="1.3")
    assert run_audit(corpus, salt_file, tmp_path / "dicom") == 0
    assert "NOT by patient: the corpus is of an earlier version" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--same-ids"]])
def test_audit__short_ids_are_compared_where_they_mean_the_same(corpus, salt_file, tmp_path, capsys, more):
    write_volume(tmp_path / "t" / "P7_scan.nii.gz", make_hu(60, SHAPE))
    arguments = (tmp_path / "t", "--name", "t", "--patient-pattern", "^([^_]+)_", *more)
    assert run_audit(corpus, salt_file, *arguments) == (2 if more else 0)
    printed = capsys.readouterr().out
    assert ("is by patient" in printed) == bool(more)
    assert ("NOT by patient: no volume of it has an id that means the same patient elsewhere" in printed) != bool(more)


def test_audit__reads_as_the_corpus_was_read(salt_file, tmp_path, capsys):
    """Values that are no HU are taken in with `hounsfield.check=false`: the audit must know them too."""
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0, SHAPE) * 4 + 9000)
    command = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "workers=1", "hounsfield.check=false"]
    assert main([*command, f"privacy.salt_file={salt_file}"]) == 0
    assert run_audit(tmp_path / "out", salt_file, tmp_path / "in", "--name", "t") == 2
    assert "is by exact" in capsys.readouterr().out


def test_audit__an_unnamed_one_never_takes_the_record_of_another(corpus, salt_file, tmp_path):
    write_volume(tmp_path / "leak" / "y.nii.gz", make_hu(2, SHAPE))
    write_volume(tmp_path / "clean" / "x.nii.gz", make_hu(50, SHAPE))
    assert run_audit(corpus, salt_file, tmp_path / "leak") == 2
    assert run_audit(corpus, salt_file, tmp_path / "clean") == 0
    assert {entry["name"]: entry["overlaps"] for entry in Corpus(corpus).info["audit"]} == {"dataset-1": 1, "dataset-2": 0}


def test_audit__can_be_withdrawn(corpus, salt_file, tmp_path, capsys):
    write_volume(tmp_path / "t" / "x.nii.gz", make_hu(50, SHAPE))
    for name in ("one", "two"):
        assert run_audit(corpus, salt_file, tmp_path / "t", "--name", name) == 0
    assert main(["audit", str(corpus), "--withdraw", "one"]) == 0
    assert [entry["name"] for entry in Corpus(corpus).info["audit"]] == ["two"]
    assert "one</td>" not in (corpus / "report.html").read_text()
    assert main(["verify", str(corpus)]) == 0
    for arguments, word in ((["--withdraw", "three"], "three"), ([], "--against")):
        assert main(["audit", str(corpus), *arguments]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "b", "--name", "x", "--name", "x"], "two data sets are called 'x'"),
        (["a", "--name", "x", "--name", "y"], "2 --name for 1 data sets"),
        (["a", "--patient-pattern", "abc"], "needs one group"),
        (["nowhere"], "no such file or folder"),
        (["empty"], "no CT volume under"),
        (["ids.txt"], "an audit compares volumes; lists of ids are for `build --exclude`"),
    ],
)
def test_audit__wrong_input_is_one_clear_line(corpus, tmp_path, capsys, monkeypatch, arguments, words):
    for name in ("a", "b"):
        write_volume(tmp_path / name / "x.nii.gz", make_hu(50, SHAPE))
    (tmp_path / "empty").mkdir()
    (tmp_path / "ids.txt").write_text("PAT-000123\n")
    monkeypatch.chdir(tmp_path)
    before = (corpus / "corpus.json").read_bytes()
    assert run_audit(corpus, None, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    assert (corpus / "corpus.json").read_bytes() == before


def test_audit__of_a_corpus_of_schema_1_finds_the_same_scan(tmp_path, capsys):
    hu = make_hu(0, (4, 64, 72))
    content = ContentHash(hu.shape)
    for plane in hu:
        content.add(plane)
    known = {"content_hash": content.hexdigest(), "shape": list(hu.shape), "format": "nifti"}
    root = write_corpus(tmp_path / "corpus", list(hu), (4.5, 4.5), 1, [known])
    write_volume(tmp_path / "t" / "x.nii.gz", hu)
    assert run_audit(root, None, tmp_path / "t", "--name", "t") == 2
    assert "v000 is by exact: x.nii.gz" in capsys.readouterr().out
    (entry,) = Corpus(root).info["audit"]
    assert (entry["overlaps_by_kind"], Corpus(root).info["schema_version"]) == ({"exact": 1}, 1)
