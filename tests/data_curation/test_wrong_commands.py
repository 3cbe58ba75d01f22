"""What a user may get wrong on the command line is one line and exit code 2, never a traceback."""

import pytest
from meddino_data_curation.cli import main

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
