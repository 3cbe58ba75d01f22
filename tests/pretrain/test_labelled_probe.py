"""The labelled probe beside training, with a command that stands for `meddino-eval`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.config import MonitoringConfig
from meddino_pretrain.monitoring.labelled_probe import LabelledProbe, check_probe_data
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining
from torch import nn

import meddino
from meddino.checkpoints.export.lineage import training_volumes
from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.data.corpus import Corpus
from meddino.data.overlap import content_key, volume_hashes

STAGE = "stage1_pretrain"
GOOD = {
    "models": {
        "teacher": {"chosen": {"macro_f1": {"mean": 0.5}}},
        "pixels": {"chosen": {"macro_f1": {"mean": 0.25}}},
    },
    "leakage": {"teacher": {"test_cases_in_pretraining": []}},
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that puts a shell script in the place of `meddino-eval`."""

    def put(script: str) -> Path:
        path = tmp_path / "bin" / "meddino-eval"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path.with_name("python")))
        return path

    return put


def writes(results: dict) -> str:
    """A script that copies the weights, notes how it was called and as which of several, and writes results after --out."""
    return (
        'while [ "$1" != "--out" ]; do case "$1" in teacher=*) cp -r "${1#teacher=}" "${1#teacher=}-copy";; esac; shift; done\n'
        f'echo "$WORLD_SIZE$RANK" > "${{0%/*}}/several"; shift; echo "$@" > "${{0%/*}}/words"\n'
        f"cat > \"$1/metrics.json\" <<'X'\n{json.dumps(results)}\nX"
    )


@pytest.fixture
def probe(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    config = MonitoringConfig(probe_data=data, probe_timeout_s=0.5)
    return LabelledProbe(tmp_path / "run" / STAGE, config, nn.Linear(2, 2), {"stage": STAGE})


def test_probe__its_numbers_and_what_stays(probe, command, monkeypatch, tmp_path):
    script = command(writes(GOOD))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    probe.config = probe.config.model_copy(update={"probe_timeout_s": 60.0})
    before = torch.get_rng_state()
    assert probe.measure(3) == {"labelled/macro_f1": 0.5, "labelled/macro_f1_pixels": 0.25}
    assert torch.equal(torch.get_rng_state(), before)
    assert script.with_name("several").read_text() == "\n"  # the process is none of the training's
    assert script.with_name("words").read_text().split()[1:] == ["device=cpu"]
    assert sorted(path.name for path in probe.folder.iterdir()) == ["step-000000003-copy", "step-000000003-results"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "exit status 3"),
        ("kill -9 $$", "SIGKILL"),
        ("sleep 20", "timed out"),
        ("exit 0", "metrics.json"),
        (writes({"models": {}, "leakage": {"teacher": {"test_cases_in_pretraining": []}}}), "teacher"),
        (
            writes({**GOOD, "leakage": {"teacher": {"test_cases_in_pretraining": ["one"]}}}),
            "1 of its test cases are in the corpus",
        ),
    ],
)
def test_probe__whatever_becomes_of_it_the_run_goes_on(probe, command, caplog, script, said):
    command(script)
    assert probe.measure(3) == {}
    (line,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "after step 3 is left out" in line.message and said in line.message
    assert not (probe.folder / "step-000000003").exists()


def test_probe__a_command_that_is_not_there_and_no_room(probe, command, caplog, monkeypatch):
    command("").unlink()
    assert probe.measure(3) == {} and "No such file" in caplog.text

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meddino_pretrain.monitoring.labelled_probe.save_training_state", full)
    assert probe.measure(4) == {} and "No space left" in caplog.text


def test_probe__without_data_nothing_is_written(tmp_path):
    assert LabelledProbe(tmp_path, MonitoringConfig(), nn.Linear(2, 2), {}).measure(1) == {}
    assert not list(tmp_path.iterdir())


def audited(**entry):
    whole = {"name": "data", "volumes": 4, "overlaps": 0, "unread": 0, "compared": {"patient": 4}, "not_compared": {}} | entry
    corpus = Mock(spec=Corpus)
    corpus.parts = [SimpleNamespace(location="corpus", info={"audit": [whole]})]
    return corpus


def test_check__only_data_that_the_corpus_was_audited_against(tmp_path, caplog):
    data = tmp_path / "data"
    config = MonitoringConfig(probe_data=data)
    with pytest.raises(ConfigError, match="no such folder"):
        check_probe_data(audited(), config)
    data.mkdir()
    check_probe_data(audited(), MonitoringConfig())
    check_probe_data(audited(), config)
    check_probe_data(audited(name="held out"), config.model_copy(update={"probe_audit": "held out"}))
    assert not caplog.records
    with pytest.raises(ConfigError, match=f"no audit called 'data'.*meddino-curate audit corpus --against {data} --name data"):
        check_probe_data(audited(name="other"), config)
    for wrong in ({"overlaps": 1}, {"unread": 1}):
        with pytest.raises(ConfigError, match="build the corpus again with --exclude"):
            check_probe_data(audited(**wrong), config)
    check_probe_data(audited(compared={"exact": 4}), config)
    assert "patients could not be compared" in caplog.text


def test_run__numbers_are_recorded_and_weights_are_those_of_a_run_without(request, command, tmp_path, write_slices):
    from tests.pretrain.conftest import disc_slice

    corpus = write_slices(tmp_path / "corpus", [disc_slice(i, 96, 80) for i in range(8)])
    info = json.loads((corpus / "corpus.json").read_text())
    (tmp_path / "data").mkdir()
    info["audit"] = audited().parts[0].info["audit"]
    (corpus / "corpus.json").write_text(json.dumps(info))
    command(writes(GOOD))
    short = [f"stages.{STAGE}.steps=3", "probe.every_steps=1", "probe.slices=4"]
    traces, states = [], []
    for name, more in (
        ("with", [f"monitoring.probe_data={tmp_path / 'data'}", "monitoring.probe_timeout_s=60"]),
        ("without", []),
    ):
        config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], [*short, "saving.tensorboard=true", *more])
        run_pretraining(config, corpus, tmp_path / name, [STAGE])
        records = read_metrics(tmp_path / name / STAGE / "metrics.jsonl")
        traces.append([{key: value for key, value in each.items() if key != TIMING} for each in records])
        newest = sorted((tmp_path / name / STAGE / "checkpoints").iterdir())[-1]
        states.append((newest / "rank-00000.safetensors").read_bytes())
    assert [record.pop("labelled/macro_f1") for record in traces[0]] == [0.5] * 3
    assert [record.pop("labelled/macro_f1_pixels") for record in traces[0]] == [0.25] * 3
    assert traces[0] == traces[1] and states[0] == states[1]
    probed = tmp_path / "with" / STAGE / "labelled_probe" / "step-000000003-copy"
    # So that the probe itself knows what was learnt from.
    assert training_volumes(probed) == {content_key(name) for name in volume_hashes(Corpus(corpus))}
    own, random = meddino.load(probed), meddino.load(f"random:{probed}")
    assert torch.equal(own.backbone.norm.weight, meddino.load(newest.parents[3] / "with").backbone.norm.weight)
    assert random.contract == own.contract
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "with" / STAGE / "tensorboard")).Reload()
    assert [one.value for one in events.Scalars("labelled/macro_f1")] == [0.5] * 3
