"""The commands one after the other on a small cohort: equal bytes twice, equal bytes after kills, one line for wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meddino.core.files import sha256_file
from meddino.demo_report import read_summary, write_report
from tests.browser import check_page
from tests.processes import Started, run

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RECIPE = PROJECT / "tests" / "pretrain" / "tiny.yaml"
STAGES = ("stage1_pretrain", "stage2_gram", "stage3_highres")

pytestmark = pytest.mark.timeout(600)


def _run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run([BIN / command, *arguments])


def _done(command: str, *arguments: object) -> None:
    run([BIN / command, *arguments], check=True)


def _bytes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _loss_trace(folder: Path) -> list[dict[str, object]]:
    lines = [line for stage in STAGES for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


def _curate(cohort: Path, corpus: Path) -> None:
    salt = cohort.parent / "salt"
    salt.write_text("a salt for tests\n")
    _done("meddino-curate", "build", cohort / "ct", "--out", corpus, "--config", "demo", f"privacy.salt_file={salt}")


def _pretrain(corpus: Path, run: Path) -> list[str]:
    return [str(BIN / "meddino-pretrain"), str(RECIPE), "--corpus", str(corpus), "--out", str(run)]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole_way") / "cohort"
    _done("meddino-curate", "phantom", "--out", folder, "--patients", 2)
    return folder


@pytest.fixture(scope="session")
def first(cohort) -> Path:
    """One uninterrupted way: corpus, run, model."""
    root = cohort.parent / "first"
    _curate(cohort, root / "corpus")
    run(_pretrain(root / "corpus", root / "run"), check=True)
    _done("meddino-export", root / "run", "--out", root / "model")
    return root


def test_whole_way__twice_gives_the_same_bytes(cohort, first):
    second = cohort.parent / "second"
    again = cohort.parent / "again"
    _done("meddino-curate", "phantom", "--out", again, "--patients", 2)
    assert _bytes(again / "ct") == _bytes(cohort / "ct")
    _curate(cohort, second / "corpus")
    assert _bytes(second / "corpus") == _bytes(first / "corpus")
    run(_pretrain(second / "corpus", second / "run"), check=True)
    assert _loss_trace(second / "run") == _loss_trace(first / "run")
    _done("meddino-export", second / "run", "--out", second / "model")
    assert _bytes(second / "model") == _bytes(first / "model")


def test_whole_way__killed_in_each_stage_exports_the_same_bytes(cohort, first):
    root = cohort.parent / "killed"
    for stage in STAGES:
        _kill_once_it_trains(_pretrain(first / "corpus", root / "run"), root / "run" / stage / "metrics.jsonl")
    run(_pretrain(first / "corpus", root / "run"), check=True)
    assert _loss_trace(root / "run") == _loss_trace(first / "run")
    _done("meddino-export", root / "run", "--out", root / "model")
    assert _bytes(root / "model") == _bytes(first / "model")


def _kill_once_it_trains(command: list[str], metrics: Path) -> None:
    """Start a command and kill it as soon as a stage has written its first step."""
    process = Started(command, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None, f"ended with {process.returncode} before {metrics} held a step"
        assert time.monotonic() < deadline, f"{metrics} held no step after 240 s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def results(cohort, first) -> Path:
    """Both segmentations of the demo, beside `first`'s model."""
    dataset = cohort / "segmentation" / "Dataset900_Phantom"
    for model, name in ((first / "model", "exported"), (f"random:{first / 'model'}", "random")):
        out = first / "results" / name
        settings = ("training.steps=5", "seeds=[0,1]", "splits.folds=2", "encoder.taps=2")
        _done("meddino-eval", "segment", "--model", model, "--data", dataset, "--out", out, "--config", "demo", *settings)
    return first / "results"


def test_segment__exported_and_random_model(results):
    for out in (results / "exported", results / "random"):
        metrics = json.loads((out / "metrics.json").read_text())
        assert 0 <= metrics["test"]["dice"]["mean"] <= 1
        assert (out / "cases.csv").read_text().startswith("case,label,dice")
        assert list((out / "predictions").rglob("*.nii.gz"))


def test_demo_report__shows_every_step_and_fits_its_window(first, results):
    write_report(first, read_summary(first, {"pretrain": 12.0}), ["meddino-curate phantom --out phantom"])
    html = (first / "report.html").read_text()
    labels = json.loads((results / "exported/metrics.json").read_text())["data"]["labels"]
    assert labels and all(f"</i>{label}</span>" in html for label in labels)  # the legend of label colours
    assert "soft-tissue window (level 40, width 400 HU)" in html
    assert len(check_page(html)["pictures"]) >= 12 + 4 * 3 + 3  # slices, PCA before and after, one case with two predictions


@pytest.fixture(scope="session")
def wrong(first, tmp_path_factory) -> Path:
    """Wrong inputs, side by side."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").mkdir()
    (root / "no_ct").mkdir()
    (root / "no_ct" / "notes.txt").write_text("no CT here\n")
    shutil.copytree(first / "model", root / "other_model")
    config = json.loads((root / "other_model" / "config.json").read_text())
    config["architecture"]["embed_dim"] *= 2
    (root / "other_model" / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("meddino-curate build {wrong}/missing --out {out}", "missing"),
        ("meddino-curate build {wrong}/empty --out {out}", "no CT volume"),
        ("meddino-curate build {wrong}/no_ct --out {out}", "no CT volume"),
        ("meddino-curate build {cohort}/ct --out {out} slices.min_body=1", "unknown key 'slices.min_body'"),
        ("meddino-pretrain smoke --corpus {wrong}/missing --out {out}", "no corpus at"),
        ("meddino-pretrain smoke --corpus {wrong}/empty --out {out}", "corpus.json is missing"),
        ("meddino-pretrain smoke --corpus {first}/corpus --out {out} sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("meddino-pretrain nonsense --corpus {first}/corpus --out {out}", "no config file 'nonsense'"),
        ("meddino-pretrain smoke --corpus {first}/corpus --out {out} init.weights={first}/model", "do not cover the model"),
        ("meddino-export {wrong}/missing --out {out}", "missing"),
        ("meddino-export {wrong}/empty --out {out}", "empty"),
        ("meddino-eval segment --model {wrong}/missing --data {dataset} --out {out} --config demo", "missing"),
        ("meddino-eval segment --model {first}/model --data {wrong}/empty --out {out} --config demo", "dataset.json"),
        ("meddino-eval segment --model {wrong}/other_model --data {dataset} --out {out} --config demo", "other_model"),
        ("meddino-demo --data {wrong}/missing --out {out}", "no such folder"),
        ("meddino-demo --data {wrong}/no_ct --out {out}", "no nnU-Net raw dataset"),
    ],
)
def test_wrong_input__one_line_and_exit_code_2(command, said, wrong, first, cohort, tmp_path):
    dataset = cohort / "segmentation" / "Dataset900_Phantom"
    words = command.format(wrong=wrong, first=first, cohort=cohort, dataset=dataset, out=tmp_path / "out").split()
    done = _run(*words)
    assert done.returncode == 2, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(told) == 1, done.stderr[-2000:]
    assert said in told[0]
    assert "Traceback" not in done.stderr
    for left in ("corpus.json", "config.json", "metrics.json"):
        assert not (tmp_path / "out" / left).exists(), f"{left} was written"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk__curate_pretrain_export_say_so(small_disk, cohort, first):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (2**20 + 2**19))
    for command in (
        ["meddino-curate", "build", cohort / "ct", "--out", small_disk / "corpus", "--config", "demo"],
        _pretrain(first / "corpus", small_disk / "run"),
        ["meddino-export", first / "run", "--out", small_disk / "model"],
    ):
        name, *arguments = [Path(str(command[0])).name, *command[1:]]
        done = _run(name, *arguments)
        assert done.returncode == 2, (name, done.stderr[-2000:])
        assert "no space left" in done.stderr or "no room for" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (small_disk / "corpus" / "corpus.json").exists()
    assert not (small_disk / "model").exists()
