"""`merge` goes on where it was killed, and has nothing to do once it is finished."""

import shutil

import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.corpus import merge as merge_module

from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_build import run_build, tree


@pytest.fixture(scope="module")
def once(tmp_path_factory, salt_file):
    """Sources, the corpus of one run, and two finished parts of it."""
    root = tmp_path_factory.mktemp("merge")
    for seed in range(4):
        write_volume(root / "in" / f"case_{seed}.nii.gz", make_hu(seed))
    assert run_build(root / "in", root / "whole", salt_file, "workers=1") == 0
    for index in (1, 2):
        assert run_build(root / "in", root / f"part{index}", salt_file, "workers=1", "--part", f"{index}/2") == 0
    return root


def command(root) -> list[str]:
    return ["merge", str(root / "part1"), str(root / "part2"), "--out", str(root / "merged")]


def test_merge__the_same_command_after_success_says_finished(once, capsys):
    assert main(command(once)) == 0
    before = tree(once / "merged")
    assert before == tree(once / "whole")
    assert main(command(once)) == 0
    assert "finished already" in capsys.readouterr().err
    assert tree(once / "merged") == before


@pytest.mark.parametrize("copied", [1, 5])
def test_merge__killed_while_copying_goes_on(once, tmp_path, monkeypatch, copied):
    for name in ("part1", "part2"):
        shutil.copytree(once / name, tmp_path / name)
        shutil.copytree(once / f"{name}.private", tmp_path / f"{name}.private")
    real, calls = shutil.copy2, []

    def killed(source, target):
        calls.append(source)
        if len(calls) > copied:
            target.write_bytes(b"half of it")
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(merge_module.shutil, "copy2", killed)
        assert main(command(tmp_path)) == 130
    calls.clear()
    monkeypatch.setattr(merge_module.shutil, "copy2", lambda *paths: calls.append(paths) or real(*paths))
    assert main(command(tmp_path)) == 0
    assert tree(tmp_path / "merged") == tree(once / "whole")
    whole = sum(len(list((tmp_path / name / ".work" / "volumes").glob("*/*"))) for name in ("part1", "part2"))
    assert len(calls) == whole - copied


def test_merge__killed_while_finishing_goes_on(once, tmp_path, monkeypatch):
    import meddino_data_curation.corpus.finish as finish_module

    arguments = [*command(once)[:-1], str(tmp_path / "merged")]
    with monkeypatch.context() as patched:
        patched.setattr(finish_module, "write_slices", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert tree(tmp_path / "merged") == tree(once / "whole")


def test_merge__of_a_shared_folder_twice(once, tmp_path, salt_file, capsys):
    for index in (1, 2):
        assert run_build(once / "in", tmp_path / "shared", salt_file, "workers=1", "--part", f"{index}/2") == 0
    assert main(["merge", str(tmp_path / "shared")]) == 0
    assert tree(tmp_path / "shared") == tree(once / "whole")
    assert main(["merge", str(tmp_path / "shared")]) == 0
    assert "finished already" in capsys.readouterr().err


def test_merge__into_the_first_part_twice(once, tmp_path, capsys):
    for name in ("part1", "part2"):
        shutil.copytree(once / name, tmp_path / name)
        shutil.copytree(once / f"{name}.private", tmp_path / f"{name}.private")
    arguments = ["merge", str(tmp_path / "part1"), str(tmp_path / "part2")]
    assert main(arguments) == 0
    assert tree(tmp_path / "part1") == tree(once / "whole")
    assert main(arguments) == 0
    assert "finished already" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "part1"), str(tmp_path / "part3")]) == 2
    assert "part3 holds no finished part" in capsys.readouterr().err


def test_merge__elsewhere_where_a_list_means_other_volumes_is_refused(once, tmp_path, salt_file, monkeypatch, capsys):
    """Else what the parts left out would come in."""
    (tmp_path / "list.txt").write_text("in/case_1.nii.gz\nin/../../nothing\ncase_2\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in").symlink_to(once / "in")
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = ("workers=1", "--exclude", str(tmp_path / "list.txt"), "--part", "1/1")
    source = tmp_path / "scans"
    source.symlink_to(once / "in")
    assert run_build(source, tmp_path / "out", salt_file, *more) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(tmp_path / "out")]) == 2
    assert "exclusion lists name other volumes than when the parts were built" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["merge", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind", ["another corpus", "other things", "another salt"])
def test_merge__into_what_is_no_merge_of_these_is_refused(once, tmp_path, salt_file, capsys, kind):
    out = tmp_path / "merged"
    if kind == "another corpus":
        write_volume(tmp_path / "in" / "a.nii.gz", make_hu(9))
        assert run_build(tmp_path / "in", out, salt_file, "workers=1") == 0
    elif kind == "other things":
        out.mkdir()
        (out / "thesis.doc").write_text("years of work")
    else:
        for name in ("part1", "part2"):
            shutil.copytree(once / name, tmp_path / name)
            shutil.copytree(once / f"{name}.private", tmp_path / f"{name}.private")
            (tmp_path / f"{name}.private" / "salt").write_text("a salt of its own")
        (tmp_path / "merged.private").mkdir()
        (tmp_path / "merged.private" / "salt").write_text("of something else")
    root = tmp_path if kind == "another salt" else once
    before = tree(tmp_path)
    assert main([*command(root)[:-1], str(out)]) == 2
    words = {"another corpus": "finished corpus of other files", "other things": "thesis.doc", "another salt": "another salt"}
    assert words[kind] in capsys.readouterr().err
    if kind != "another salt":
        assert tree(tmp_path) == before
    else:
        assert (tmp_path / "merged.private" / "salt").read_text() == "of something else"
