"""What a user may get wrong on the command line is one line and exit code 2, never a traceback."""

import numpy as np
import pytest
from meddino_data_curation.cli import main
from PIL import Image

from tests.data_curation.conftest import make_hu, write_volume


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    write_volume(root / "in" / "a.nii.gz", make_hu(0))
    assert main(["build", str(root / "in"), "--out", str(root / "corpus"), "workers=1"]) == 0
    return root


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("build in --out file/corpus", "file"),
        ("build in --out file", "is a file"),
        ("build in --out /proc/nowhere/corpus", "/proc/nowhere"),
        (f"build in --out {'x' * 300}", "file name too long"),
        ("build in --out /", "--out / "),
        ("sample corpus --out sheet.png --count 0", "--count 0: a contact sheet shows at least 1 slice"),
        ("sample corpus --out sheet.png --count -3", "--count -3"),
        ("sample corpus --out sheet.png --seed -1", "--seed -1"),
        ("sample corpus --out file/sheet.png", "file"),
        ("sample corpus --out folder", "error: folder: is a directory"),
        ("show ftp://example.org/corpus", "ftp:// is not read; allowed: http://, https://, s3://"),
        ("verify file:///corpus", "file:// is not read"),
        ("show nowhere", "nowhere"),
        ("phantom --out file/cohort --patients 1", "file"),
        ("phantom --out cohort --patients 0", "patients"),
        ("phantom --out cohort --patients -3", "patients"),
        ("plan --root in --out file/sets.yaml", ""),
        ("build in --out new workers=0", "workers"),
        ("build in --out new --part 0/3", "--part 0/3"),
        ("build in --out new --exclude nowhere", "nowhere"),
        ("merge nowhere", "nowhere"),
    ],
)
def test_main__one_line_and_2(words, said, corpus, monkeypatch, capsys):
    (corpus / "file").write_text("a file")
    (corpus / "folder").mkdir(exist_ok=True)
    monkeypatch.chdir(corpus)
    capsys.readouterr()
    assert main(words.split(" ")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert said in error[0]


def test_build__into_the_folder_one_stands_in(tmp_path, monkeypatch):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path / "corpus")
    assert main(["build", "../in", "--out", ".", "workers=1"]) == 0
    assert (tmp_path / "corpus" / "corpus.json").is_file()
    assert (tmp_path / "corpus.private" / "salt").is_file()
    assert main(["verify", "."]) == 0


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["ct"], "error: no CT volume under 0: 1 files, none of them DICOM, NIfTI, NRRD, MHA or MHD"),
        (["mr"], "error: no MR volume under 0: 1 files, none of them DICOM, NIfTI, NRRD, MHA or MHD"),
        (["image"], "error: no picture under 0: 1 files, none of them DICOM, NIfTI, NRRD, MHA, MHD, PNG"),
        (["auto"], "error: no volume or picture under 0: 1 files, none of them DICOM, NIfTI, NRRD, MHA, MHD, PNG"),
        (["ct", "mr"], "error: no volume under 0, 1: 2 files, none of them DICOM, NIfTI, NRRD, MHA or MHD"),
        (["ct", "image"], "error: no volume or picture under 0, 1: 2 files"),
    ],
)
def test_build__says_what_it_looked_for_in_a_source_of_each_modality(kinds, said, tmp_path, monkeypatch, capsys):
    for number, _ in enumerate(kinds):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "notes.txt").write_text("nothing else here")
    sources = "".join(f"  - {{name: s{number}, path: '{number}', modality: {kind}}}\n" for number, kind in enumerate(kinds))
    (tmp_path / "sources.yaml").write_text(f"sources:\n{sources}")
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--config", "sources.yaml", "--out", "corpus", "workers=1"]) == 2
    assert said in capsys.readouterr().err


def test_audit__says_what_it_looked_for_beside_a_corpus_of_pictures(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "sources.yaml").write_text("sources:\n  - {name: pictures, path: in, modality: image}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--config", "sources.yaml", "--out", "corpus", "workers=1"]) == 0
    assert main(["audit", "corpus", "--against", "empty"]) == 2
    assert "no picture under empty: 0 files" in capsys.readouterr().err
