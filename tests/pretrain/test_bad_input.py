"""Wrong input: one clear line, exit code 2, and nothing that a rerun would trust."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from meddino_pretrain.cli import main

from meddino.core.files import write_json

TINY = str(Path(__file__).with_name("tiny.yaml"))
ONE_STEP = [
    "stages.stage1_pretrain.steps=1",
    "stages.stage2_gram.method.gram_teacher.step=1",
    "stages.stage3_highres.method.gram_teacher.step=1",
]


def refused(capsys, *arguments: str) -> str:
    """Run the command, expect exit code 2 and exactly one line on stderr that is no log record."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meddino-pretrain: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def begun(make_corpus_once, tmp_path):
    run = tmp_path / "run"
    assert main([TINY, "--corpus", str(make_corpus_once), "--out", str(run), "--stage", "stage1_pretrain", *ONE_STEP]) == 0
    return run


def test_pretrain__missing_corpus(capsys, tmp_path):
    line = refused(capsys, TINY, "--corpus", tmp_path / "none", "--out", tmp_path / "run")
    assert "no such folder" in line and not (tmp_path / "run").exists()


def test_pretrain__a_folder_that_is_no_corpus(capsys, tmp_path):
    line = refused(capsys, TINY, "--corpus", tmp_path, "--out", tmp_path / "run")
    assert "corpus.json is missing" in line and not (tmp_path / "run").exists()


def test_pretrain__corpus_of_another_version(capsys, make_corpus_once, tmp_path):
    corpus = shutil.copytree(make_corpus_once, tmp_path / "corpus")
    write_json(corpus / "corpus.json", {**json.loads((corpus / "corpus.json").read_text()), "schema_version": 99})
    assert "schema version 99" in refused(capsys, TINY, "--corpus", corpus, "--out", tmp_path / "run")


def test_pretrain__missing_shard(capsys, make_corpus_once, tmp_path):
    corpus = shutil.copytree(make_corpus_once, tmp_path / "corpus")
    next((corpus / "shards").iterdir()).unlink()
    assert "lacks 1 of 2 shards" in refused(capsys, TINY, "--corpus", corpus, "--out", tmp_path / "run")


def test_pretrain__changed_corpus_under_a_run(capsys, begun, make_corpus_once, tmp_path):
    corpus = shutil.copytree(make_corpus_once, tmp_path / "corpus")
    write_json(corpus / "corpus.json", {**json.loads((corpus / "corpus.json").read_text()), "content_hash": "f" * 64})
    assert "learns from a corpus" in refused(capsys, TINY, "--corpus", corpus, "--out", begun, *ONE_STEP)


def test_pretrain__unknown_recipe_names_the_shipped_ones(capsys, make_corpus_once, tmp_path):
    line = refused(capsys, "smok", "--corpus", make_corpus_once, "--out", tmp_path / "run")
    assert "ct3m_vitb" in line and "smoke" in line


def test_pretrain__unknown_key_names_the_nearest(capsys, make_corpus_once, tmp_path):
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path / "run", "optimizer.clip_grad_nrm=1.0")
    assert "optimizer.clip_grad_nrm" in line and "clip_grad_norm" in line


def test_pretrain__unknown_backbone(capsys, make_corpus_once, tmp_path):
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path / "run", "backbone.name=vitb61")
    assert "did you mean 'vitb16'" in line


def test_pretrain__changed_config_under_a_run(capsys, begun, make_corpus_once):
    line = refused(
        capsys, TINY, "--corpus", make_corpus_once, "--out", begun, *ONE_STEP, "optimizer.layerwise_decay=0.5", "seed=3"
    )
    assert "optimizer.layerwise_decay: 0.9 -> 0.5" in line and "seed: 0 -> 3" in line


def test_pretrain__where_it_runs_and_how_it_is_looked_at_may_change(begun, make_corpus_once):
    again = [TINY, "--corpus", str(make_corpus_once), "--out", str(begun), "--stage", "stage1_pretrain", *ONE_STEP]
    free = ["saving.keep_last=3", "loader.prefetch=4", "probe.every_steps=7", "probe.slices=4", "diagnosis.min_rank=3.0"]
    free += ["machine.activation_checkpointing=true", "stages.stage1_pretrain.accumulation=2", "stages.stage3_highres.steps=2"]
    assert main([*again, *free]) == 0
    (change,) = json.loads((begun / "run.json").read_text())["changes"]
    assert change["after"] == {"stage": "stage1_pretrain", "step": 1}
    assert "stages.stage1_pretrain.accumulation: 1 -> 2" in change["keys"] and len(change["keys"]) == len(free)


def test_pretrain__the_length_of_a_stage_that_has_begun_may_not_change(capsys, begun, make_corpus_once):
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", begun, *ONE_STEP, "stages.stage1_pretrain.steps=2")
    assert "stages.stage1_pretrain.steps: 1 -> 2" in line


def test_pretrain__a_batch_that_does_not_divide_is_refused_before_anything_is_written(capsys, make_corpus_once, tmp_path):
    wrong = "stages.stage1_pretrain.accumulation=3"
    assert "does not divide" in refused(capsys, TINY, "--out", tmp_path / "run", "--corpus", make_corpus_once, wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("contract", ["{modality: ct, channels: 1}", "{modality: image, mean: [0.5], std: [0.5]}"])
def test_pretrain__grey_for_a_backbone_of_three_channels(capsys, make_corpus_once, tmp_path, contract):
    words = (f"input_contract={contract}", "--corpus", make_corpus_once, "--out", tmp_path / "run")
    line = refused(capsys, TINY, *words)
    assert "input_contract gives 1 channels" in line and "takes 3" in line and "backbone.changes.in_chans=1" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["init.weights=/nope", "corpus"])
def test_pretrain__a_wrong_first_command_binds_nobody(capsys, make_corpus, make_corpus_once, tmp_path, wrong):
    run = [TINY, "--out", str(tmp_path / "run"), "--stage", "stage1_pretrain", *ONE_STEP]
    corpus, key = (
        (make_corpus(count=8, name="other").root, "init.weights=/nope") if wrong == "corpus" else (make_corpus_once, wrong)
    )
    refused(capsys, *run, "--corpus", corpus, key, "seed=7")
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    assert main([*run, "--corpus", str(make_corpus_once)]) == 0
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert after["id"] == before["id"] and "seed: 0" in (tmp_path / "run" / "config.yaml").read_text()
    assert "seed: 0 -> 7" in refused(capsys, *run, "--corpus", make_corpus_once, "seed=7")


def test_pretrain__checkpoint_of_another_architecture(capsys, begun, make_corpus_once, tmp_path):
    other = [f"init.weights={begun}", "backbone.changes.depth=3"]
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path / "other", *other)
    assert "blocks.2" in line or "cover" in line


def test_pretrain__a_folder_with_something_else(capsys, make_corpus_once, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path)
    assert "holds no run" in line and (tmp_path / "thesis.txt").read_text() == "mine"


def test_pretrain__two_at_once(capsys, begun, make_corpus_once):
    import fcntl

    with (begun / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in refused(capsys, TINY, "--corpus", make_corpus_once, "--out", begun, *ONE_STEP)


def test_pretrain__no_space(capsys, make_corpus_once, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path / "run")
    assert re.search(r"no room for .*free some space", line)
    assert not list((tmp_path / "run").glob("*/checkpoints/*"))


def test_pretrain__disk_full_while_saving(capsys, make_corpus_once, tmp_path, monkeypatch):
    import errno

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "step-000000001")

    monkeypatch.setattr("meddino_pretrain.run.checkpoints.save_training_state", full)
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", tmp_path / "run", *ONE_STEP)
    assert "no space left on the disk" in line
    monkeypatch.undo()
    again = [TINY, "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--stage", "stage1_pretrain", *ONE_STEP]
    assert main(again) == 0


def test_pretrain__more_corrupt_samples_than_allowed(make_corpus_once, tmp_path, capsys):
    corpus = shutil.copytree(make_corpus_once, tmp_path / "corpus")
    for shard in (corpus / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        for place in range(700, len(data), 800):
            data[place] ^= 0xFF
        shard.write_bytes(bytes(data))
    line = refused(capsys, TINY, "--corpus", corpus, "--out", tmp_path / "run", "loader.max_corrupt=2", "probe.slices=2")
    assert "damaged" in line or "can be read" in line


@pytest.mark.parametrize("content", [None, "seed: [1,\n", "no_key: 1\n"])
def test_pretrain__a_run_whose_recipe_is_missing_or_damaged(capsys, begun, make_corpus_once, content):
    path = begun / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    line = refused(capsys, TINY, "--corpus", make_corpus_once, "--out", begun, *ONE_STEP)
    wanted = f"{begun} is damaged: config.yaml is missing; put it back" if content is None else f"{begun} is damaged (config "
    assert wanted in line and "choose another --out" in line and "cpu_small" not in line


def test_pretrain__done_names_the_report_only_if_there_is_one(capsys, begun, make_corpus_once):
    words = [TINY, "--corpus", str(make_corpus_once), "--out", str(begun), "--stage", "stage1_pretrain", *ONE_STEP]
    assert main(words) == 0
    assert f"done: {begun}   next: meddino-export {begun} --out MODEL" in capsys.readouterr().out
    assert main([*words, "saving.report=true"]) == 0
    assert f"done: {begun}/report.html   next" in capsys.readouterr().out
