import json
import sys
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
import webdataset
from meddino_data_curation.cli import main

from meddino.core.files import sha256_file
from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.processes import Started, children, is_alive, wait_until


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


def run_build(source: Path, out: Path, salt: Path, *more: str) -> int:
    return main(["build", str(source), "--out", str(out), f"privacy.salt_file={salt}", *more])


@pytest.fixture(scope="module")
def corpus_folder(six_volumes, salt_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    assert run_build(six_volumes, out, salt_file, "workers=1", "shards.size_mib=0.05") == 0
    return out


def test_build__every_slice_of_every_orientation_comes_back_as_written(corpus_folder):
    corpus = Corpus(corpus_folder)
    assert len(corpus) == 36
    expected = {make_hu(seed)[z].tobytes() for seed in range(6) for z in range(6)}
    assert {corpus.read(index).tobytes() for index in range(36)} == expected
    by_volume: dict[str, list[tuple[int, bytes]]] = {}
    for index, row in enumerate(corpus.slices.to_pylist()):
        by_volume.setdefault(row["volume_id"], []).append((row["z_index"], corpus.read(index).tobytes()))
    volumes = {tuple(make_hu(seed)[z].tobytes() for z in range(6)) for seed in range(6)}
    assert {tuple(data for _, data in sorted(slices)) for slices in by_volume.values()} == volumes  # z from the feet up


def test_build__manifests_say_what_the_slices_are(corpus_folder):
    corpus = Corpus(corpus_folder)
    assert np.allclose(corpus.spacing_mm, 4.5)
    for row in corpus.slices.to_pylist():
        assert row["z_mm"] == pytest.approx(5.0 * row["z_index"])
        assert (row["rows"], row["cols"]) == (64, 72)
        assert row["intensity_p01"] < -900 < row["intensity_p99"]
        assert 0.25 < row["body_fraction"] < 0.7
    for row in corpus.volumes.to_pylist():
        assert row["status"] == "accepted"
        assert row["num_slices_kept"] == 6
        assert row["shape"] == [6, 64, 72]
    assert corpus.info["totals"]["slices"] == 36
    assert len(corpus.info["shards"]) == 3  # volumes stay whole: two of about 30 KiB each


def test_build__plain_webdataset_streams_the_same_slices(corpus_folder):
    corpus = Corpus(corpus_folder)
    shards = [str(path) for path in sorted((corpus_folder / "shards").iterdir())]
    streamed = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == corpus.slices.column("key").to_pylist()
    for index, sample in enumerate(streamed):
        info = json.loads(sample["json"])
        row = corpus.slices.slice(index, 1).to_pylist()[0]
        assert {name: info[name] for name in info if name in row} == {name: row[name] for name in info if name in row}
        assert set(info) - set(row) == {"dataset"}
        assert np.array_equal(blosc2.ndarray_from_cframe(sample["b2"])[:], corpus.read(index))


def test_build__same_bytes_whatever_the_workers(corpus_folder, six_volumes, salt_file, tmp_path):
    assert run_build(six_volumes, tmp_path / "two", salt_file, "workers=2", "shards.size_mib=0.05") == 0
    assert tree(tmp_path / "two") == tree(corpus_folder)


def test_build__another_salt_gives_the_same_slices_in_the_same_order(corpus_folder, six_volumes, tmp_path):
    """Also of scans that come twice: which copy stays must not hang on its id."""
    corpora = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.salt").write_text(f"salt number {name}")
        extra = write_volume(tmp_path / "more" / "copy.nii.gz", make_hu(3))
        command = ["build", str(six_volumes), str(extra), "--out", str(tmp_path / name), "workers=1", "shards.size_mib=0.05"]
        assert main([*command, f"privacy.salt_file={tmp_path / name}.salt"]) == 0
        corpora.append(Corpus(tmp_path / name))
    first, second = ([corpus.read(index).tobytes() for index in range(len(corpus))] for corpus in corpora)
    assert first == second
    assert set(corpora[0].slices["key"].to_pylist()).isdisjoint(corpora[1].slices["key"].to_pylist())
    hashes, other = (corpus.volumes["content_hash"].to_pylist() for corpus in corpora)
    assert hashes == other == sorted(hashes)
    kept, others = ([(row["dataset"], row["status"]) for row in corpus.volumes.to_pylist()] for corpus in corpora)
    assert sorted(kept) == sorted(others)


def test_build__png16_holds_the_same_slices(six_volumes, salt_file, corpus_folder, tmp_path):
    assert run_build(six_volumes, tmp_path / "png", salt_file, "workers=1", "shards.codec=png16") == 0
    png, blosc = Corpus(tmp_path / "png"), Corpus(corpus_folder)
    assert [png.read(index).tobytes() for index in range(36)] == [blosc.read(index).tobytes() for index in range(36)]


def _start_build(source: Path, out: Path, salt: Path, workers: int) -> Started:
    program = "import sys; from meddino_data_curation.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "build", str(source), "--out", str(out), f"privacy.salt_file={salt}"]
    return Started([*command, f"workers={workers}", "shards.size_mib=0.05"])


@pytest.mark.parametrize(("workers", "records"), [(1, 2), (2, 4)])
def test_build__sigkill_then_the_same_command_ends_in_the_same_bytes(
    corpus_folder, six_volumes, salt_file, tmp_path, workers, records
):
    out = tmp_path / "killed"
    process = _start_build(six_volumes, out, salt_file, workers)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".work/volumes/*/*.json"))) < records and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    workers_of_it = children(process.pid)
    process.kill()
    process.wait(timeout=30)
    wait_until(lambda: not any(is_alive(worker) for worker in workers_of_it), 30)  # no worker outlives its parent
    if not (out / "corpus.json").exists():  # a slow moment may let it finish; then there is nothing to go on with
        finished = {path.name: path.stat().st_mtime_ns for path in out.glob(".work/volumes/*/*.json")}
        (out / "shards").mkdir(exist_ok=True)
        (out / "shards" / "slices-000007.tar").write_bytes(b"left by nobody knows what")
        again = _start_build(six_volumes, out, salt_file, 1)
        log = again.communicate(timeout=120)[1]
        assert again.returncode == 0, log
        assert f"{len(finished)} of 6 volumes are done already" in log or not finished
    assert tree(out) == tree(corpus_folder)


def test_build__killed_between_shards_goes_on_from_them(corpus_folder, six_volumes, salt_file, tmp_path, monkeypatch):
    import meddino_data_curation.corpus.finish as finish_module

    monkeypatch.setattr(finish_module, "write_slices", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    more = ("workers=1", "shards.size_mib=0.05")
    assert run_build(six_volumes, tmp_path / "out", salt_file, *more) == 130
    assert not (tmp_path / "out" / "corpus.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert len(times) == 3
    monkeypatch.undo()
    assert run_build(six_volumes, tmp_path / "out", salt_file, *more) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()} == times
    assert tree(tmp_path / "out") == tree(corpus_folder)


def test_build__shards_of_a_changed_plan_are_made_again(six_volumes, salt_file, tmp_path, monkeypatch):
    import shutil

    import meddino_data_curation.corpus.finish as finish_module

    source = tmp_path / "volumes"
    shutil.copytree(six_volumes, source)
    monkeypatch.setattr(finish_module, "write_slices", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    more = ("workers=1", "shards.size_mib=0.05")
    assert run_build(source, tmp_path / "out", salt_file, *more) == 130
    monkeypatch.undo()
    (source / "a.nii.gz").unlink()
    write_volume(source / "new.nii.gz", make_hu(77))
    assert run_build(source, tmp_path / "out", salt_file, *more) == 0
    assert run_build(source, tmp_path / "fresh", salt_file, *more) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_build__finished_corpus_is_left_alone_and_other_input_refused(six_volumes, salt_file, tmp_path, capsys):
    source = tmp_path / "one"
    write_volume(source / "a.nii.gz", make_hu(0))
    out = tmp_path / "out"
    assert run_build(source, out, salt_file, "workers=1") == 0
    before = tree(out)
    assert run_build(source, out, salt_file, "workers=1") == 0
    assert tree(out) == before
    assert run_build(source, out, salt_file, "workers=1", "slices.z_stride_mm=10") == 2
    assert "finished corpus" in capsys.readouterr().err
    assert tree(out) == before


def test_build__full_disk_is_one_line_and_the_run_can_go_on(
    corpus_folder, six_volumes, salt_file, tmp_path, monkeypatch, capsys
):
    import errno

    from meddino_data_curation.selection import volume_job

    real, calls = volume_job.encode_slice, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(volume_job, "encode_slice", full)
    more = ("workers=1", "shards.size_mib=0.05")
    assert run_build(six_volumes, tmp_path / "out", salt_file, *more) == 2
    error = capsys.readouterr().err
    assert "no space left" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "corpus.json").exists()
    monkeypatch.undo()
    assert run_build(six_volumes, tmp_path / "out", salt_file, *more) == 0
    assert tree(tmp_path / "out") == tree(corpus_folder)


def test_build__a_reader_that_dies_costs_one_volume(six_volumes, salt_file, tmp_path, monkeypatch):
    from meddino_data_curation import worker_pool

    from tests.data_curation import dying_worker

    monkeypatch.setattr(worker_pool, "_work", dying_worker.work)
    assert run_build(six_volumes, tmp_path / "out", salt_file, "workers=2") == 0
    rows = Corpus(tmp_path / "out").volumes.to_pylist()
    assert sorted(row["status"] for row in rows) == ["accepted"] * 5 + ["rejected"]
    assert "ended the process" in next(row["reason"] for row in rows if row["status"] == "rejected")


def _text_folder(root: Path) -> Path:
    (root / "texts").mkdir()
    (root / "texts" / "notes.txt").write_text("no CT here")
    return root / "texts"


def _label_folder(root: Path) -> Path:
    write_volume(root / "labels" / "mask.nii.gz", (make_hu(0) > 0).astype(np.uint8))
    return root / "labels"


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lambda root: root / "nowhere", [], "no such file or folder"),
        (lambda root: (root / "empty").mkdir() or root / "empty", [], "0 files"),
        (_text_folder, [], "1 files, none of them"),
        (_label_folder, [], "none of 1 volumes could be used: 1 x looks like a label map"),
        (lambda root: root, ["slices.z_strid_mm=3"], "did you mean 'z_stride_mm'"),
        (lambda root: root, ["--part", "3/2"], "1 <= i <= n"),
        (lambda root: root, ["--config", "nonsense"], "shipped names"),
    ],
)
def test_build__wrong_input_is_one_clear_line(tmp_path, salt_file, capsys, prepare, arguments, words):
    source = prepare(tmp_path)
    assert run_build(source, tmp_path / "out", salt_file, "workers=1", *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert words in error[0]
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_build__too_many_refusals_stop_the_run(tmp_path, salt_file, capsys):
    for seed in range(4):
        write_volume(tmp_path / "in" / f"{seed}.nii.gz", np.zeros((3, 64, 64), np.int16))
    write_volume(tmp_path / "in" / "good.nii.gz", make_hu(0))
    more = ("workers=1", "limits.max_rejected_fraction=0.3", "limits.rejected_fraction_after=3")
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, *more) == 2
    assert "max_rejected_fraction" in capsys.readouterr().err


def test_build__out_with_other_things_is_refused(tmp_path, salt_file, six_volumes, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    assert run_build(six_volumes, tmp_path / "out", salt_file) == 2
    assert "thesis.doc" in capsys.readouterr().err


def test_build__a_source_without_volumes_is_told(six_volumes, salt_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    command = ["build", str(six_volumes), str(tmp_path / "empty"), "workers=1", f"privacy.salt_file={salt_file}"]
    assert main([*command, "--out", str(tmp_path / "out"), "--name", "first", "--name", "second"]) == 0
    assert "source 'second' holds no file that may be a volume" in capsys.readouterr().err


def test_verify__finds_a_flipped_bit_and_names_the_slice(corpus_folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus_folder, copy)
    assert main(["verify", str(copy)]) == 0
    corpus = Corpus(copy)
    row = corpus.slices.slice(3, 1).to_pylist()[0]
    path = copy / "shards" / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    printed = capsys.readouterr()
    assert f"slice {row['key']}" in printed.out
    assert "checksum differs" in printed.out
    (copy / "volumes.parquet").write_bytes(b"gone")
    assert main(["verify", str(copy)]) == 2
    assert "volumes.parquet: checksum differs" in capsys.readouterr().out


def test_show_and_sample__print_and_draw(corpus_folder, tmp_path, capsys):
    from PIL import Image

    assert main(["show", str(corpus_folder)]) == 0
    assert "36 slices of 6 volumes" in capsys.readouterr().out
    assert main(["sample", str(corpus_folder), "--out", str(tmp_path / "sheet.png"), "--count", "9"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L")).astype(int)
    assert pixels.std() > 20
    # Nine tiles in rows of four, one line of title, one below each row; no caption reaches into its neighbour's place.
    assert pixels.shape == (14 + 3 * 206, 4 * 192)
    assert pixels[:14].min() < 128
    for row in range(3):
        line = pixels[14 + 206 * row + 192 : 14 + 206 * (row + 1)].min(axis=0)
        assert all((line[192 * column - 6 : 192 * column] > 200).all() for column in range(1, 5))
        assert (line < 128).any()


def test_build__real_data(shared_data, salt_file, tmp_path):
    source = shared_data / "ct"
    assert run_build(source, tmp_path / "real", salt_file, "duplicates.near=false") == 0
    corpus = Corpus(tmp_path / "real")
    assert corpus.info["totals"]["volumes"] == 99
    assert corpus.info["totals"]["rejected"] == 0
    formats = {row["format"] for row in corpus.volumes.to_pylist()}
    assert formats == {"nifti", "dicom"}
    assert json.loads((tmp_path / "real" / "corpus.json").read_text())["totals"]["slices"] == len(corpus)
