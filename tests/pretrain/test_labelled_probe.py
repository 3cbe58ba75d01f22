"""The labelled probe beside training, with a command that stands for `meddino-eval`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.config import MonitoringConfig
from meddino_pretrain.monitoring.labelled_probe import LabelledProbe, check_probe_data
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining
from PIL import Image
from torch import nn

import meddino
from meddino.checkpoints.export.lineage import training_volumes
from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.data.content import volume_hash
from meddino.data.corpus import Corpus
from meddino.data.overlap import content_key, volume_hashes
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import AXIAL_LPS
from meddino.volumes.writing import write_label_map, write_volume
from tests.data.tiny_corpus import write_corpus
from tests.pretrain.conftest import disc_slice

STAGE, PYTHON = "stage1_pretrain", sys.executable
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
        python = path.with_name("python")
        python.write_text(f'#!/bin/sh\nexec {PYTHON} "$@"\n')
        python.chmod(0o755)
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
    config = MonitoringConfig(probe_data=data, probe_timeout_s=5.0)
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


def test_probe__the_warning_ends_with_what_the_command_said_last(probe, command, caplog):
    command('echo first; echo "meddino-eval: error: no case is left" >&2; echo; exit 2')
    assert probe.measure(3) == {}
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "exit status 2; the last line of" in line and line.endswith("log.txt: meddino-eval: error: no case is left")
    assert "-c" not in line  # nor how it was started


def test_probe__the_folder_of_an_earlier_attempt_is_not_met_again(probe, command):
    script = 'while [ "$1" != "--out" ]; do shift; done; [ -e "$2/.lock" ] && exit 2\n'
    command(script + f'echo held > "$2/.lock"\ncat > "$2/metrics.json" <<\'X\'\n{json.dumps(GOOD)}\nX')
    assert probe.measure(3)["labelled/macro_f1"] == 0.5
    assert probe.measure(3)["labelled/macro_f1"] == 0.5


def test_probe__ends_with_a_run_that_is_killed(command, tmp_path):
    command(f'echo $$ > "{tmp_path}/pid.new"; mv "{tmp_path}/pid.new" "{tmp_path}/pid"; exec sleep 60')
    (tmp_path / "data").mkdir()
    code = (
        "import sys; from pathlib import Path; from torch import nn; "
        "from meddino_pretrain.monitoring.config import MonitoringConfig; "
        "from meddino_pretrain.monitoring.labelled_probe import LabelledProbe; "
        f"sys.executable = '{sys.executable}'; "
        f"LabelledProbe(Path('{tmp_path}/run'), MonitoringConfig(probe_data=Path('{tmp_path}/data')), nn.Linear(2, 2), "
        "{'stage': 's'}).measure(1)"
    )
    run = subprocess.Popen([PYTHON, "-c", code])
    wait_for((tmp_path / "pid").exists, 60)
    run.kill()
    run.wait()
    probed = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(probed), 10)


def wait_for(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """False of a process that is gone or that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_probe__records_which_data_its_numbers_are_of(probe, command):
    command(writes({**GOOD, "data": {"hash": "f00d"}}))
    assert probe.measure(3) == {"labelled/macro_f1": 0.5, "labelled/macro_f1_pixels": 0.25, "labelled/data": "f00d"}


def scans(folder: Path, first: int, count: int) -> list[np.ndarray]:
    """Write volumes of their own into a folder, and return their voxels."""
    folder.mkdir(parents=True)
    found = []
    for number in range(first, first + count):
        voxels = np.stack([disc_slice(100 * number + z, 24, 20) for z in range(3)])
        axes = AXIAL_LPS if number % 2 else AXIAL_LPS * [[1.0], [-1.0], [1.0]]
        volume = voxels if number % 2 else voxels[:, ::-1]  # the same scan, stored from back to front
        write_volume(
            folder / f"case{number}_0000.nii.gz", volume, Geometry((3, 24, 20), (5.0, 0.8, 0.8), (0.0, 0.0, 0.0), axes)
        )
        found.append(voxels)
    return found


@pytest.fixture
def labelled(tmp_path, write_slices):
    """A data set of three training and one test volume with labels, and a function that writes a corpus that holds some."""
    data = tmp_path / "data"
    train, test = scans(data / "imagesTr", 1, 3), scans(data / "imagesTs", 4, 1)
    for part, images in (("Tr", train), ("Ts", test)):
        (data / f"labels{part}").mkdir()
        for number in range(len(images)):
            write_label_map(
                data / f"labels{part}" / f"case{number}.nii.gz",
                (images[number] > 0).astype(np.uint8),
                Geometry((3, 24, 20), (5.0, 0.8, 0.8), (0.0, 0.0, 0.0), AXIAL_LPS),
            )

    def corpus(held: list[np.ndarray], **entry) -> Path:
        rows = [{"content_hash": volume_hash(list(voxels), 3)} for voxels in held] + [{"content_hash": "0" * 32}] * 2
        info = audited(**entry).parts[0].info
        pixels = [disc_slice(z, 96, 80) for z in range(8)]
        return write_corpus(tmp_path / f"corpus{len(list(tmp_path.iterdir()))}", pixels, volumes=rows[:2], **info)

    return SimpleNamespace(data=data, train=train, test=test, corpus=corpus)


@pytest.mark.parametrize("held", [["train", 0], ["train", 1], ["test", 0]])
def test_check__every_labelled_volume_is_compared_with_the_corpus_whatever_the_audit_says(labelled, held):
    config = MonitoringConfig(probe_data=labelled.data)
    check_probe_data(Corpus(labelled.corpus([])), config)
    leaking = labelled.corpus([getattr(labelled, held[0])[held[1]]])
    with pytest.raises(
        ConfigError, match=rf"1 of its 4 volumes are in the corpus .*case{held[1] + 1 + 3 * (held[0] == 'test')}"
    ):
        check_probe_data(Corpus(leaking), config)


def test_check__images_elsewhere_that_a_table_names_are_compared_too(labelled, tmp_path):
    data = tmp_path / "table"
    data.mkdir()
    image, label = labelled.data / "imagesTr" / "case2_0000.nii.gz", labelled.data / "labelsTr" / "case1.nii.gz"
    (data / "cases.csv").write_text(f"case,image,label\na,{image},{label}\n")
    config = MonitoringConfig(probe_data=data, probe_audit="data")
    check_probe_data(Corpus(labelled.corpus([labelled.train[0]])), config)
    with pytest.raises(ConfigError, match="1 of its 1 volumes"):
        check_probe_data(Corpus(labelled.corpus([labelled.train[1]])), config)


def test_check__an_audit_of_fewer_volumes_was_of_other_data(labelled):
    with pytest.raises(ConfigError, match=r"holds 4 volumes, and the audit 'data' .* looked at 3, so .*meddino-curate audit"):
        check_probe_data(Corpus(labelled.corpus([], volumes=3)), MonitoringConfig(probe_data=labelled.data))


def test_check__pictures_are_compared(tmp_path, write_slices):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(data / "images" / "a.png")
    held = [{"content_hash": volume_hash([grey], 1)}]
    corpus = write_corpus(tmp_path / "corpus", [disc_slice(0, 96, 80)] * 4, volumes=held, **audited().parts[0].info)
    with pytest.raises(ConfigError, match="1 of its 1 volumes"):
        check_probe_data(Corpus(corpus), MonitoringConfig(probe_data=data))


def test_check__a_volume_that_cannot_be_read_is_told(labelled, caplog):
    (labelled.data / "imagesTr" / "case1_0000.nii.gz").write_bytes(b"torn")
    check_probe_data(Corpus(labelled.corpus([])), MonitoringConfig(probe_data=labelled.data))
    assert "case1_0000.nii.gz could not be compared with the corpus" in caplog.text


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_pretrain__leaking_labelled_data_is_one_line_and_nothing_begins(labelled, tmp_path, request, capsys, more):
    tiny, corpus = str(request.path.with_name("tiny.yaml")), labelled.corpus([labelled.train[2]])
    words = ["--corpus", str(corpus), "--out", str(tmp_path / "run"), f"monitoring.probe_data={labelled.data}"]
    assert main([tiny, *words, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meddino-pretrain: error:")]
    assert "1 of its 4 volumes are in the corpus" in line and not (tmp_path / "run").exists()
