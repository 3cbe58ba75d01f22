"""Finished corpora changed: erased, grown, put together; everything searched afterwards."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from meddino_data_curation.changes import revision
from meddino_data_curation.cli import main
from meddino_data_curation.corpus.verify import verify

from meddino.data.corpus import Corpus
from meddino.data.overlap import VOLUMES_FILE, content_key, volume_hashes
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import write_series
from tests.data_curation.test_build import tree
from tests.data_curation.test_privacy import texts_of

SHAPE = (6, 64, 72)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Two series and a copy of patient PAT-000123, two other DICOM patients, two NIfTI files, a label map; small shards."""
    root = tmp_path_factory.mktemp("changes")
    for name, seed, patient in (("a", 0, "PAT-000123"), ("b", 1, "PAT-000123"), ("c", 2, "PAT-000777"), ("d", 3, "PAT-000888")):
        write_series(root / "in" / name, make_hu(seed, SHAPE), series=name, patient=patient, StudyInstanceUID=f"1.2.{seed}")
    write_volume(root / "in" / "doe_jane.nii.gz", make_hu(4, SHAPE))
    write_volume(root / "in" / "copy_of_a.nrrd", make_hu(0, SHAPE))
    write_volume(root / "in" / "scan_17.nii.gz", make_hu(5, SHAPE))
    write_volume(root / "in" / "mask.nii.gz", (make_hu(5, SHAPE) > 0).astype(np.uint8))
    command = ["build", str(root / "in"), "--out", str(root / "corpus"), "workers=1", "shards.size_mib=0.03"]
    assert main(command) == 0
    return root / "corpus"


@pytest.fixture
def corpus(built, tmp_path) -> Path:
    shutil.copytree(f"{built}.private", tmp_path / "corpus.private")
    return shutil.copytree(built, tmp_path / "corpus")


def everything(corpus: Path) -> bytes:
    """All bytes of a corpus and its private folder, as they lie and unpacked."""
    paths = [path for root in (corpus, Path(f"{corpus}.private")) for path in sorted(root.rglob("*")) if path.is_file()]
    return b"\n".join(str(path.name).encode() + b"\n" + text for path in paths for text in texts_of(path))


def rows_of(corpus: Path) -> dict[str, dict]:
    return {row["volume_id"]: row for row in Corpus(corpus).volumes.to_pylist()}


def ids_of(corpus: Path, *words: str) -> set[str]:
    """Volumes whose line of the source map has one of the words."""
    lines = (Path(f"{corpus}.private") / "sources.jsonl").read_text().splitlines()
    return {json.loads(line)["volume_id"] for line in lines if any(word in line for word in words)}


def test_erase__leaves_no_byte_of_a_patient(corpus, capsys):
    before, rows = Corpus(corpus), rows_of(corpus)
    gone = ids_of(corpus, "a/", "b/", "copy_of_a")
    assert len(gone) == 3
    needles = {
        value.encode() for name in gone for key, value in rows[name].items() if key.endswith(("_key", "_id", "_hash")) and value
    }
    needles |= {b"copy_of_a", *(row["content_hash"].encode() for row in before.slices.to_pylist() if row["volume_id"] in gone)}
    frames = {
        before.shards.read(row["shard"], row["offset"], row["length"], 0)
        for row in before.slices.to_pylist()
        if row["volume_id"] in gone
    }
    assert len(frames) == 12
    text = everything(corpus)
    assert all(needle in text for needle in needles | frames)
    kept = {
        row["key"]: before.read(index).tobytes()
        for index, row in enumerate(before.slices.to_pylist())
        if row["volume_id"] not in gone
    }
    old_shards = set(before.info["shards"])
    assert main(["erase", str(corpus), "--patient", "pat_000123"]) == 0
    assert "erased 3 volumes, 12 slices" in capsys.readouterr().out
    text = everything(corpus)
    assert not [needle for needle in needles | frames if needle in text]
    after = Corpus(corpus)
    assert {after.key(index): after.read(index).tobytes() for index in range(len(after))} == kept
    assert main(["verify", str(corpus)]) == 0
    assert after.content_hash != before.content_hash
    assert after.info["history"] == [{"what": "erased", "volumes": 3, "from": before.content_hash}]
    assert old_shards & set(after.info["shards"])  # what was not concerned is as it was
    stones = [row for row in after.volumes.to_pylist() if row["status"] == "erased"]
    assert len(stones) == 3 == after.info["totals"]["erased"]
    assert not (corpus / ".work").exists()


def test_erase__is_done_once_and_unknown_names_are_one_line(corpus, capsys):
    assert main(["erase", str(corpus), "--patient", "PAT-000777"]) == 0
    state = tree(corpus)
    assert main(["erase", str(corpus), "--patient", "PAT-000777"]) == 0
    assert "erased before" in capsys.readouterr().out
    assert tree(corpus) == state
    for arguments, word in ((["--patient", "PAT-000666"], "PAT-000666"), ([], "--patient")):
        assert main(["erase", str(corpus), *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert word in line
    assert tree(corpus) == state


TWO_GONE = ["--patient", "PAT-000123", "--volume", "doe_jane.nii.gz"]


@pytest.fixture(scope="module")
def erased(built, tmp_path_factory) -> tuple[dict[str, str], dict[str, str]]:
    """What lies in a corpus and in its private folder after an erasure that nothing interrupts."""
    root = tmp_path_factory.mktemp("erased") / "corpus"
    shutil.copytree(f"{built}.private", f"{root}.private")
    shutil.copytree(built, root)
    assert main(["erase", str(root), *TWO_GONE]) == 0
    return tree(root), tree(Path(f"{root}.private"))


@pytest.mark.parametrize("after", [1, 2, 4, 6, 8, 10, 12])
def test_erase__killed_anywhere_is_finished_by_the_same_command(corpus, erased, monkeypatch, after):
    """Killed at the n-th of 12 writes, moves and removals of files."""
    count = 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count >= after:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_shard", "write_volumes", "write_text"):
            patch.setattr(revision, name, dying(getattr(revision, name)))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        assert main(["erase", str(corpus), *TWO_GONE]) == 130
    assert main(["erase", str(corpus), *TWO_GONE]) == 0
    assert (tree(corpus), tree(Path(f"{corpus}.private"))) == erased


def test_erase__by_list_volume_and_file(corpus, tmp_path):
    (tmp_path / "list.txt").write_text("# withdrawn\ndoe_jane\nc\n")
    (volume,) = ids_of(corpus, "scan_17")
    assert main(["erase", str(corpus), "--list", str(tmp_path / "list.txt"), "--volume", volume]) == 0
    status = [row["status"] for row in rows_of(corpus).values()]
    assert (status.count("erased"), status.count("accepted")) == (3, 3)


def test_erase__of_everything_is_refused(corpus, capsys):
    names = [word for patient in ("PAT-000123", "PAT-000777", "PAT-000888") for word in ("--patient", patient)]
    state = tree(corpus)
    assert main(["erase", str(corpus), *names, "--volume", "doe_jane", "--volume", "scan_17"]) == 2
    assert "no volume" in capsys.readouterr().err
    assert tree(corpus) == state


def test_add__only_what_is_new_comes_in(corpus, built, tmp_path, capsys):
    before = Corpus(corpus)
    source = built.parent / "in"
    assert main(["add", str(source), "--to", str(corpus), "workers=1"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    more = tmp_path / "more"
    write_volume(more / "new.nii.gz", make_hu(20, SHAPE))
    write_volume(more / "copy.mha", make_hu(2, SHAPE))  # of patient 777's scan
    assert main(["add", str(more), "--to", str(corpus), "workers=1"]) == 0
    after = Corpus(corpus)
    assert len(after) == len(before) + 6
    assert [after.read(index).tobytes() for index in range(len(before))] == [
        before.read(index).tobytes() for index in range(len(before))
    ]
    status = {(row["dataset"], row["status"]) for row in after.volumes.to_pylist()}
    assert {("source-2", "accepted"), ("source-2", "duplicate")} <= status
    assert after.content_hash != before.content_hash
    assert main(["verify", str(corpus)]) == 0
    assert set(before.info["shards"]) < set(after.info["shards"])
    state = tree(corpus)
    assert main(["add", str(more), "--to", str(corpus), "workers=1"]) == 0
    assert tree(corpus) == state
    assert not (Path(f"{corpus}.private") / "adding").exists()


def test_add__what_was_erased_does_not_come_back(corpus, tmp_path, capsys):
    assert main(["erase", str(corpus), "--patient", "PAT-000123", "--volume", "doe_jane"]) == 0
    write_volume(tmp_path / "more" / "renamed.nrrd", make_hu(4, SHAPE))
    write_series(tmp_path / "more" / "x", make_hu(30, SHAPE), series="x", patient="PAT-000123")
    write_volume(tmp_path / "more" / "other.nii.gz", make_hu(31, SHAPE))
    assert main(["add", str(tmp_path / "more"), "--to", str(corpus), "workers=1"]) == 0
    assert "2 volumes were erased before" in capsys.readouterr().err
    assert [row["dataset"] for row in rows_of(corpus).values()].count("source-2") == 1
    assert b"renamed" not in everything(corpus)


def test_add__held_out_data_counts_for_old_and_new(corpus, tmp_path):
    write_volume(tmp_path / "held" / "t.nii.gz", make_hu(2, SHAPE))  # old
    write_volume(tmp_path / "held" / "u.nii.gz", make_hu(21, SHAPE))  # new
    write_volume(tmp_path / "more" / "one.nii.gz", make_hu(21, SHAPE))
    write_volume(tmp_path / "more" / "two.nii.gz", make_hu(22, SHAPE))
    command = ["add", str(tmp_path / "more"), "--to", str(corpus), "workers=1", "--exclude", str(tmp_path / "held")]
    assert main(command) == 0
    held = [row for row in rows_of(corpus).values() if str(row["reason"]).startswith("held out")]
    assert sorted(row["dataset"] for row in held) == ["source-1", "source-2"]
    (entry,) = Corpus(corpus).info["audit"]
    assert (entry["left_out"], entry["volumes"], entry["overlaps"]) == (2, 2, 0)


def test_add__withdraws_audits_that_did_not_see_the_new_volumes(corpus, tmp_path, capsys):
    write_volume(tmp_path / "t" / "x.nii.gz", make_hu(50, SHAPE))
    assert main(["audit", str(corpus), "--against", str(tmp_path / "t"), "--name", "t"]) == 0
    write_volume(tmp_path / "more" / "one.nii.gz", make_hu(21, SHAPE))
    assert main(["add", str(tmp_path / "more"), "--to", str(corpus), "workers=1"]) == 0
    assert "withdrawn" in capsys.readouterr().err
    assert Corpus(corpus).info["audit"] == []


def test_add__a_name_of_another_folder_is_refused(corpus, tmp_path, capsys):
    write_volume(tmp_path / "more" / "one.nii.gz", make_hu(21, SHAPE))
    assert main(["add", str(tmp_path / "more"), "--to", str(corpus), "--name", "mine"]) == 0
    state = tree(corpus)
    write_volume(tmp_path / "others" / "one.nii.gz", make_hu(22, SHAPE))
    assert main(["add", str(tmp_path / "others"), "--to", str(corpus), "--name", "mine"]) == 2
    assert "'mine'" in capsys.readouterr().err
    assert tree(corpus) == state


def test_merge__of_finished_corpora_holds_each_scan_once(corpus, tmp_path, capsys):
    salt = Path(f"{corpus}.private") / "salt"
    write_volume(tmp_path / "in" / "copy.mha", make_hu(2, SHAPE))
    write_volume(tmp_path / "in" / "new.nii.gz", make_hu(40, SHAPE))
    command = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "second"), "--name", "second", "workers=1"]
    assert main([*command, f"privacy.salt_file={salt}"]) == 0
    parts = (tree(corpus), tree(tmp_path / "second"))
    command = ["merge", str(corpus), str(tmp_path / "second"), "--out", str(tmp_path / "both")]
    assert main(command) == 0
    assert (tree(corpus), tree(tmp_path / "second")) == parts
    both = Corpus(tmp_path / "both")
    assert len(both) == len(Corpus(corpus)) + 6
    hashes = both.slices.column("content_hash").to_pylist()
    assert len(set(hashes)) == len(hashes)
    assert volume_hashes(both) == volume_hashes(Corpus(corpus)) | volume_hashes(Corpus(tmp_path / "second"))
    (copy,) = [row for row in both.volumes.to_pylist() if row["dataset"] == "second" and row["status"] == "duplicate"]
    assert rows_of(tmp_path / "both")[copy["duplicate_of"]]["dataset"] == "source-1"
    assert main(["verify", str(tmp_path / "both")]) == 0
    state = tree(tmp_path / "both")
    assert main(command) == 0
    assert tree(tmp_path / "both") == state
    assert "nothing to do" in capsys.readouterr().err


def test_merge__a_corpus_and_its_own_grown_copy_hold_each_slice_once(corpus, tmp_path, capsys):
    for name in ("", ".private"):
        shutil.copytree(f"{corpus}{name}", tmp_path / f"copy{name}")
    write_volume(tmp_path / "in" / "new.nii.gz", make_hu(40, SHAPE))
    assert main(["add", str(tmp_path / "in"), "--to", str(tmp_path / "copy"), "--name", "second"]) == 0
    assert main(["merge", str(corpus), str(tmp_path / "copy"), "--out", str(tmp_path / "both")]) == 0
    assert "under one id and are taken once" in capsys.readouterr().err
    both, grown = Corpus(tmp_path / "both"), Corpus(tmp_path / "copy")
    assert sorted(both.slices.column("key").to_pylist()) == sorted(grown.slices.column("key").to_pylist())
    assert main(["verify", str(tmp_path / "both")]) == 0
    table = pq.read_table(tmp_path / "both" / "slices.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 2)]), tmp_path / "both" / "slices.parquet")
    assert "2 slices stand there more than once" in "\n".join(verify(tmp_path / "both"))


def test_merge__of_another_salt_says_what_is_not_compared(corpus, tmp_path, capsys):
    write_volume(tmp_path / "in" / "copy.mha", make_hu(2, SHAPE))
    write_series(tmp_path / "in" / "x", make_hu(41, SHAPE), series="x", patient="PAT-000123")
    assert main(["build", str(tmp_path / "in"), "--out", str(tmp_path / "second"), "--name", "second", "workers=1"]) == 0
    assert main(["merge", str(corpus), str(tmp_path / "second"), "--out", str(tmp_path / "both")]) == 0
    assert "another salt" in capsys.readouterr().err
    rows = [row for row in rows_of(tmp_path / "both").values() if row["dataset"] == "second"]
    assert sorted(row["status"] for row in rows) == ["accepted", "duplicate"]
    assert {row["patient_key"] for row in rows} == {None}


def test_merge__one_name_of_two_folders_is_told(corpus, tmp_path, capsys):
    write_volume(tmp_path / "in" / "new.nii.gz", make_hu(40, SHAPE))
    assert main(["build", str(tmp_path / "in"), "--out", str(tmp_path / "second"), "workers=1"]) == 0
    assert main(["merge", str(corpus), str(tmp_path / "second"), "--out", str(tmp_path / "both")]) == 0
    assert "'source-1' is 2 folders" in capsys.readouterr().err


def test_merge__curated_by_other_rules_is_refused(corpus, tmp_path, capsys):
    write_volume(tmp_path / "in" / "new.nii.gz", make_hu(40, SHAPE))
    command = ["build", str(tmp_path / "in"), "--out", str(tmp_path / "second"), "workers=1", "slices.z_stride_mm=10"]
    assert main(command) == 0
    assert main(["merge", str(corpus), str(tmp_path / "second"), "--out", str(tmp_path / "both")]) == 2
    assert "slices.z_stride_mm=10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PAT-000123", ["kept, 6 slices", "duplicate (exact) of source-1/copy_of_a.nrrd"]),
        ("copy_of_a.nrrd", ["kept, 6 slices"]),
        ("mask", ["looks like a label map"]),
        ("c/", ["kept, 6 slices"]),
    ],
)
def test_why__says_what_became_of_a_name(built, capsys, name, words):
    assert main(["why", name, str(built)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(word in " ".join(lines) for word in words)
    assert len(lines) >= len(words)


def test_why__of_nothing_is_one_line(built, capsys):
    assert main(["why", "nobody", str(built)]) == 2
    assert "'nobody'" in capsys.readouterr().err


def test_who_saw__names_corpora_runs_and_models_also_after_an_erasure(corpus, tmp_path, capsys):
    keys = {row["volume_id"]: content_key(row["content_hash"]) for row in rows_of(corpus).values() if row["content_hash"]}
    seen = [keys[name] for name in ids_of(corpus, "a/", "b/")]
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / VOLUMES_FILE).write_text("\n".join(sorted(keys.values())))
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / VOLUMES_FILE).write_text(seen[0] + "\n")
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / VOLUMES_FILE).write_text("0123456789abcdef\n")
    command = [
        "who-saw",
        "PAT-000123",
        "--corpus",
        str(corpus),
        "--runs",
        str(tmp_path / "runs"),
        "--models",
        str(tmp_path / "models"),
        str(tmp_path / "models" / "m"),
    ]
    assert main(command) == 0
    before = capsys.readouterr().out
    assert f"corpus {corpus}: 3 volumes" in before
    assert f"run {tmp_path / 'runs' / 'first'}: 2 volumes" in before
    assert before.count(f"model {tmp_path / 'models' / 'm'}: 1 volumes") == 1  # named once, however it was reached
    assert "other" not in before
    assert main(["erase", str(corpus), "--patient", "PAT-000123"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    after = capsys.readouterr().out
    assert f"corpus {corpus}: 0 volumes; 3 were erased" in after
    assert before.splitlines()[1:] == after.splitlines()[1:]


def test_refusals__are_a_table_with_files_for_the_owner(built):
    path = Path(f"{built}.private") / "refused.csv"
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open() as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert rows["mask.nii.gz"]["reason"].startswith("looks like a label map")
    (copy,) = [row for row in rows.values() if row["status"] == "duplicate"]
    assert copy["file"].startswith("series") and "a/" in copy["file"]
    assert copy["reason"] == "exact duplicate of source-1/copy_of_a.nrrd"


def test_totals__patients_that_no_id_tells_are_said_to_be_unknown(built, capsys):
    (source,) = Corpus(built).info["sources"]
    assert (source["patients"], source["volumes_of_unknown_patients"]) == (4, 2)  # doe_jane and copy_of_a name nobody
    assert "4; 2 volumes of unknown patients" in (built / "report.html").read_text()
    assert main(["show", str(built)]) == 0
    assert "2 volumes of unknown patients" in " ".join(capsys.readouterr().out.split())
