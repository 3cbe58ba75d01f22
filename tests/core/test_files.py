import errno
import hashlib
import shutil

import pytest

from meddino.core.errors import MedDINOError
from meddino.core.files import (
    atomic_directory,
    atomic_write,
    canonical_json,
    check_free_space,
    is_disk_full,
    locked_folder,
    remove_leftovers,
    remove_leftovers_of,
    sha256_file,
    sizes_below,
    told_by_system,
    write_json,
)


def test_atomic_write__an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    with atomic_write(path) as stream:
        stream.write(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"new, but interrupted")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]


def test_atomic_directory__appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / "file").write_text(content)
            assert not (target / "file").exists() or (target / "file").read_text() == "one"
    assert (target / "file").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_atomic_directory__takes_up_what_killed_processes_left(tmp_path):
    target = tmp_path / "model"
    for name in ("model.123.partial", "model.124.old", "models.5.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(RuntimeError), atomic_directory(target):
        assert (target / "file").read_text() == "model.124.old"  # killed between its two renames: nothing else is left of it
        raise RuntimeError
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "models.5.partial"]


def test_atomic_directory__leaves_what_another_is_writing(tmp_path):
    with atomic_directory(tmp_path / "model") as own:
        other = tmp_path / "model.1.partial"
        own.rename(other)  # as if of another process
        with atomic_directory(tmp_path / "model") as second:
            (second / "file").write_text("second")
        assert other.is_dir()
        other.rename(own)
    assert not (tmp_path / "model" / "file").exists()  # the last one stands


def test_remove_leftovers__takes_nobody_elses_files(tmp_path):
    names = ("a.json.77.partial", "b.partial", "77.partial", "deep/c.csv.1.partial", "a.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert [name for name in names if (tmp_path / name).exists()] == ["b.partial", "77.partial", "a.json"]


def test_sizes_below__goes_on_where_a_folder_vanishes(tmp_path):
    (tmp_path / "first").write_bytes(b"1")
    for name in ("volumes", "shards"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_bytes(b"123")
    looking = sizes_below(tmp_path)
    assert next(looking) == (tmp_path / "first", 1)
    shutil.rmtree(tmp_path / "volumes")  # as a build does that has ended
    assert list(looking) == [(tmp_path / "shards" / "deep" / "file", 3)]
    assert list(sizes_below(tmp_path / "absent")) == []


def test_remove_leftovers_of__takes_those_of_one_file(tmp_path):
    names = ("a[1].yaml.77.partial", "a[1].yaml.partial", "b.yaml.77.partial", "a1.yaml.77.partial", "a[1].yaml")
    for name in names:
        (tmp_path / name).write_text("x")
    remove_leftovers_of(tmp_path / "a[1].yaml")
    assert [name for name in names if not (tmp_path / name).exists()] == ["a[1].yaml.77.partial"]


def test_told_by_system__finds_a_full_disk_in_a_librarys_error(tmp_path):
    hidden = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(told_by_system(hidden, tmp_path / "a"))
    other = RuntimeError("bad direction cosines")
    assert told_by_system(other, tmp_path / "a") is other


def test_sha256_file__equals_hashlib(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_check_free_space__says_what_and_where(tmp_path):
    check_free_space(tmp_path / "not" / "there", 1, "a byte")
    with pytest.raises(MedDINOError, match=r"no room for a checkpoint in .*MiB needed.*MiB free"):
        check_free_space(tmp_path, 2**60, "a checkpoint")


def test_json__is_canonical_and_refuses_nan(tmp_path):
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_is_disk_full__knows_both_reasons():
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert not is_disk_full(OSError(errno.ENOENT, "gone"))
    assert not is_disk_full(ValueError())


def test_locked_folder__a_wrong_command_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="wrong"), locked_folder(tmp_path / "out"):
        raise ValueError("wrong")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with locked_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_locked_folder__keeps_others_out_and_leaves_no_file(tmp_path):
    with locked_folder(tmp_path / "out"):
        with pytest.raises(MedDINOError, match=r"another command is writing into .*out"), locked_folder(tmp_path / "out"):
            pass
        with locked_folder(tmp_path / "other"):
            pass
    with locked_folder(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []
