from pathlib import Path

import numpy as np
import pytest
from meddino_data_curation.cli import main

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_build import run_build, tree


def rows_by_place(out: Path) -> dict[str, dict]:
    import json

    lines = (out.with_name(out.name + ".private") / "sources.jsonl").read_text().splitlines()
    places = {entry["volume_id"]: entry["source_path"] for entry in map(json.loads, lines)}
    return {places[row["volume_id"]]: row for row in Corpus(out).volumes.to_pylist()}


@pytest.fixture
def source(tmp_path):
    """Four patients; one of them also re-saved, one also noised and flipped, one also from another set."""
    shape = (10, 64, 72)
    for seed in range(4):
        write_volume(tmp_path / "in" / f"case_{seed}.nii.gz", make_hu(seed, shape))
    write_volume(tmp_path / "in" / "again_0.mha", make_hu(0, shape).astype(np.float32), orientation="RAS")
    noisy = make_hu(1, shape)[:7, :, ::-1] + np.random.default_rng(0).normal(0, 10, (7, 64, 72))
    write_volume(tmp_path / "in" / "guise_1.nrrd", np.rint(noisy).astype(np.int16))
    return tmp_path / "in"


def test_build__one_of_each_group_is_kept_and_links_say_of_what(source, salt_file, tmp_path):
    assert run_build(source, tmp_path / "out", salt_file, "workers=1") == 0
    rows = rows_by_place(tmp_path / "out")
    pair = sorted((rows["case_0.nii.gz"], rows["again_0.mha"]), key=lambda row: row["status"])
    assert [row["status"] for row in pair] == ["accepted", "duplicate"]
    assert pair[1]["duplicate_of"] == pair[0]["volume_id"]
    assert pair[1]["duplicate_kind"] == "exact"
    guise = rows["guise_1.nrrd"]
    assert (guise["status"], guise["duplicate_kind"]) == ("duplicate", "near")
    assert guise["duplicate_of"] == rows["case_1.nii.gz"]["volume_id"]  # it has more slices
    assert len(Corpus(tmp_path / "out")) == 40


def test_build__preference_decides_which_is_kept(tmp_path, salt_file):
    for folder in ("first", "second"):
        write_volume(tmp_path / folder / "a.nii.gz", make_hu(0))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"sources:\n- {{name: one, path: {tmp_path / 'first'}, preference: 5}}\n"
        f"- {{name: two, path: {tmp_path / 'second'}, preference: 1}}\n"
    )
    command = ["build", "--out", str(tmp_path / "out"), "--config", str(config), f"privacy.salt_file={salt_file}", "workers=1"]
    assert main(command) == 0
    kept = {row["dataset"]: row["status"] for row in Corpus(tmp_path / "out").volumes.to_pylist()}
    assert kept == {"one": "duplicate", "two": "accepted"}


def test_build__duplicates_can_be_kept(source, salt_file, tmp_path):
    more = ("workers=1", "duplicates.exact=false", "duplicates.near=false")
    assert run_build(source, tmp_path / "out", salt_file, *more) == 0
    assert Corpus(tmp_path / "out").info["totals"]["accepted"] == 6


def test_exclude__folder_keeps_every_guise_of_its_scans_out(source, salt_file, tmp_path):
    held = tmp_path / "imagesTs"
    write_volume(held / "test_0000.nii.gz", make_hu(0, (10, 64, 72))[2:8, ::-1])
    write_volume(held / "test_0001.nii.gz", make_hu(1, (10, 64, 72)))
    assert run_build(source, tmp_path / "out", salt_file, "workers=1", "--exclude", str(held)) == 0
    status = {place: row["status"] for place, row in rows_by_place(tmp_path / "out").items()}
    assert status == {
        "case_0.nii.gz": "rejected", "again_0.mha": "rejected", "case_1.nii.gz": "rejected", "guise_1.nrrd": "rejected",
        "case_2.nii.gz": "accepted", "case_3.nii.gz": "accepted",
    }  # fmt: skip
    assert "held out" in rows_by_place(tmp_path / "out")["again_0.mha"]["reason"]
    (entry,) = Corpus(tmp_path / "out").info["audit"]
    assert (entry["volumes"], entry["overlaps"], entry["left_out"]) == (2, 0, 4)
    assert main(["audit", str(tmp_path / "out"), "--against", str(held), "--salt-file", str(salt_file)]) == 0


@pytest.mark.parametrize("line", ["case_2", "case_2.nii.gz", "# comment\ncase_2, with more columns"])
def test_exclude__list_names_files(source, salt_file, tmp_path, line):
    (tmp_path / "held_out.csv").write_text(line + "\n")
    assert run_build(source, tmp_path / "out", salt_file, "workers=1", "--exclude", str(tmp_path / "held_out.csv")) == 0
    rows = rows_by_place(tmp_path / "out")
    assert rows["case_2.nii.gz"]["reason"] == "held out: named by an exclusion list"
    assert rows["case_3.nii.gz"]["status"] == "accepted"


def test_exclude__missing_list_is_one_line(source, salt_file, tmp_path, capsys):
    assert run_build(source, tmp_path / "out", salt_file, "--exclude", str(tmp_path / "nowhere.txt")) == 2
    assert "nowhere.txt: no such file" in capsys.readouterr().err


def test_audit__names_overlaps_and_the_corpus_records_them(source, salt_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_build(source, out, salt_file, "workers=1") == 0
    clean, leak = tmp_path / "clean", tmp_path / "leak"
    write_volume(clean / "x.nii.gz", make_hu(50, (10, 64, 72)))
    write_volume(leak / "y.nii.gz", np.clip(make_hu(3, (10, 64, 72)), -160, 240))
    arguments = ["audit", str(out), "--against", str(clean), str(leak), "--name", "clean", "--name", "leaky"]
    assert main([*arguments, "--salt-file", str(salt_file)]) == 2
    printed = capsys.readouterr().out
    volume_id = rows_by_place(out)["case_3.nii.gz"]["volume_id"]
    assert f"leaky: {volume_id} is by near" in printed
    assert "y.nii.gz" in printed
    assert "clean: 0 overlaps with 1 volumes" in printed
    record = {entry["name"]: entry for entry in Corpus(out).info["audit"]}
    assert record["clean"]["overlaps"] == 0
    assert record["leaky"]["overlapping_volumes"] == [volume_id]
    assert main(["verify", str(out)]) == 0


def test_audit__another_corpus_and_the_same_patient(tmp_path, salt_file, capsys):
    config = tmp_path / "config.yaml"
    for number, name in enumerate(("one", "two")):
        write_volume(tmp_path / name / "PATIENT-0042" / "scan.nii.gz", make_hu(10 * number + 1, (10, 64, 72)))
        config.write_text(f"sources:\n- {{name: {name}, path: {tmp_path / name}, patient_pattern: '^([^/]+)/'}}\n")
        command = ["build", "--out", str(tmp_path / f"corpus_{name}"), "--config", str(config), "workers=1"]
        assert main([*command, f"privacy.salt_file={salt_file}"]) == 0
    arguments = ["audit", str(tmp_path / "corpus_one"), "--against", str(tmp_path / "corpus_two")]
    assert main([*arguments, "--salt-file", str(salt_file)]) == 2
    assert "is by patient" in capsys.readouterr().out


def test_audit__wrong_salt_is_refused(source, salt_file, tmp_path, capsys):
    assert run_build(source, tmp_path / "out", salt_file, "workers=1") == 0
    (tmp_path / "other").write_text("quite another salt")
    arguments = ["audit", str(tmp_path / "out"), "--against", str(source), "--salt-file", str(tmp_path / "other")]
    assert main(arguments) == 2
    assert "is not the one" in capsys.readouterr().err


@pytest.mark.parametrize("shared_out", [True, False])
def test_merge__parts_give_the_bytes_of_one_run(source, salt_file, tmp_path, shared_out):
    assert run_build(source, tmp_path / "whole", salt_file, "workers=1") == 0
    outs = [tmp_path / ("parts" if shared_out else f"part{index}") for index in (1, 2, 3)]
    for index, out in enumerate(outs, start=1):
        assert run_build(source, out, salt_file, "workers=1", "--part", f"{index}/3") == 0
        assert not (out / "corpus.json").exists()
    folders = [str(out) for out in dict.fromkeys(outs)]
    assert main(["merge", *folders, "--out", str(tmp_path / "merged") if not shared_out else folders[0]]) == 0
    assert tree(tmp_path / "merged" if not shared_out else outs[0]) == tree(tmp_path / "whole")


def test_merge__missing_part_is_named(source, salt_file, tmp_path, capsys):
    assert run_build(source, tmp_path / "out", salt_file, "workers=1", "--part", "1/3") == 0
    assert main(["merge", str(tmp_path / "out")]) == 2
    assert "parts are missing: 2, 3" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing")]) == 2
    assert "holds no finished part" in capsys.readouterr().err


def test_licences__unclear_ones_need_a_decision(source, salt_file, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"sources:\n- {{name: set, path: {source}, licence: CC BY-NC-SA 4.0}}\n")
    command = ["build", "--out", str(tmp_path / "out"), "--config", str(config), "workers=1", f"privacy.salt_file={salt_file}"]
    assert main(command) == 2
    assert "licences.allow" in capsys.readouterr().err
    assert main([*command, "licences.allow=[CC BY-NC-SA 4.0]"]) == 0
    assert Corpus(tmp_path / "out").info["licences"] == ["CC BY-NC-SA 4.0"]
