"""What the demo chooses to read, before any of its commands runs."""

import json
import signal
import sys

import pytest

from meddino.core.errors import MedDINOError
from meddino.demo import make_plan
from tests.processes import Started, is_alive, run, wait_until


@pytest.fixture
def data(tmp_path):
    """A folder with labelled sets: two of CT, one of MR with the highest number."""
    for name, channels in (("Dataset001_A", ["CT"]), ("Dataset002_B", ["CT"]), ("Dataset003_M", ["T1"])):
        for images in ("imagesTr", "labelsTr"):
            (tmp_path / "segmentation" / name / images).mkdir(parents=True)
        text = json.dumps({"channel_names": dict(enumerate(channels)), "labels": {"background": 0, "a": 1}})
        (tmp_path / "segmentation" / name / "dataset.json").write_text(text)
    return tmp_path


def test_make_plan__takes_the_last_set_of_ct_and_says_what_becomes_of_the_others(data, tmp_path):
    plan = make_plan(data, tmp_path / "out", seed=0)
    assert plan.dataset.name == "Dataset002_B"
    assert [word.rpartition("segmentation/")[2] for word in plan.held_out() if word != "--exclude"] == [
        "Dataset002_B/imagesTr",
        "Dataset001_A/imagesTr",
    ]
    said = "\n".join(plan.told())
    assert all(part in said for part in ("Dataset002_B is segmented", "Dataset001_A stays out", "Dataset003_M (T1)"))


def test_make_plan__where_no_name_says_ct_the_last_is_taken(data, tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        file = data / "segmentation" / name / "dataset.json"
        file.write_text(file.read_text().replace("CT", "T2"))
    assert make_plan(data, tmp_path / "out", seed=0).dataset.name == "Dataset003_M"


def test_make_plan__a_broken_dataset_is_refused_before_anything_is_trained(data, tmp_path):
    file = data / "segmentation" / "Dataset001_A" / "dataset.json"
    file.write_text("{}")
    with pytest.raises(MedDINOError, match=str(file)):
        make_plan(data, tmp_path / "out", seed=0)


def _step(tmp_path, code):
    """Start a demo of one step, which runs so much Python; return it once the step has begun."""
    (tmp_path / "step.py").write_text(f"import pathlib, signal, sys, time\n{code}\n")
    demo = Started([sys.executable, "-c", DEMO, tmp_path / "step.py"], cwd=tmp_path)
    wait_until(lambda: (tmp_path / "begun").exists() or demo.poll() is not None)
    return demo


DEMO = """
import sys
from pathlib import Path
from meddino import demo
step = demo.Step("step", "take a step", (Path(sys.executable).name, sys.argv[1]))
demo.Plan.steps = lambda plan: [step]
raise SystemExit(demo.main(["--out", "out"]))
"""
SAVES = """
def save(number, frame):
    pathlib.Path("saved").write_text(str(number))
    sys.exit({code})
for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(one, save)
pathlib.Path("begun").write_text(str(__import__("os").getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_demo__hands_a_signal_on_waits_for_the_step_and_says_once_more(sent, code, tmp_path):
    demo = _step(tmp_path, SAVES.format(code=code))
    demo.send_signal(getattr(signal, sent))
    assert demo.wait(30) == code, demo.stderr
    assert (tmp_path / "saved").read_text() == str(int(getattr(signal, sent)))
    said = [line for line in demo.stderr.splitlines() if line.startswith("meddino-demo: ")]
    assert len(said) == 1 and "the same command again" in said[0]
    assert not is_alive(int((tmp_path / "begun").read_text()))


def test_demo__a_step_ends_when_the_demo_is_killed(tmp_path):
    demo = _step(tmp_path, SAVES.format(code=0))
    demo.kill()
    demo.wait(30)
    wait_until(lambda: not is_alive(int((tmp_path / "begun").read_text())), seconds=10)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("step", "code", "said"),
    [
        ("sys.exit(75)", 75, "the same command again"),
        ("import os; os.kill(os.getpid(), signal.SIGKILL)", 75, "SIGKILL"),
        ("sys.exit(pathlib.Path(sys.executable).name + ': error: a key is wrong')", 2, "exit code 1"),
        (
            "print(pathlib.Path(sys.executable).name + ' build: error: a key is wrong'); sys.exit(2)",
            2,
            "': a key is wrong (log:",
        ),
    ],
)
def test_demo__ends_as_its_step_does(step, code, said, tmp_path):
    demo = _step(tmp_path, step)
    assert demo.wait(30) == code, demo.stderr
    assert said in demo.stderr and "Traceback" not in demo.stderr


def test_demo__a_second_one_in_its_folder_is_refused(tmp_path):
    demo = _step(tmp_path, SAVES.format(code=0))
    second = run([sys.executable, "-c", DEMO, tmp_path / "step.py"], cwd=tmp_path)
    demo.send_signal(signal.SIGTERM)
    assert (second.returncode, demo.wait(30)) == (2, 75)
    assert "another command" in second.stderr
