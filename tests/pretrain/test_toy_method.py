"""A method of sixty lines on a timm ResNet goes the whole way without a line changed elsewhere."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods import METHODS
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.export.write import export_model
from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from tests.pretrain import toy_method
from tests.processes import Started

RECIPE = Path(__file__).with_name("toy.yaml")
ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from tests.pretrain import toy_method; toy_method.register(); from meddino_pretrain.cli import main; "


@pytest.fixture(scope="module", autouse=True)
def toy():
    toy_method.register()
    yield
    del METHODS["toy"]


def command(corpus: Path, run: Path, *more: str) -> list[str]:
    arguments = [str(RECIPE), "--corpus", str(corpus), "--out", str(run), *more]
    return [sys.executable, "-c", f"{COMMAND} sys.exit(main({arguments!r}))"]


def trace(run: Path, stage: str) -> list[dict]:
    records = read_metrics(run / stage / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != TIMING} for record in records]


def last_state(run: Path, stage: str) -> bytes:
    return (sorted((run / stage / "checkpoints").iterdir())[-1] / "rank-00000.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_corpus_once):
    run = tmp_path_factory.mktemp("toy") / "run"
    run_pretraining(load_config(PretrainConfig, [RECIPE]), make_corpus_once, run)
    return run


def test_toy__trains_is_watched_and_reported(alone):
    records = trace(alone, "first")
    for record in records:
        assert record["loss"] == pytest.approx(record["agreement"] + record["spread"], rel=1e-5)
    assert {"grad_norm/backbone", "grad_norm/projector"} <= records[0].keys()
    assert "features/patch_consistency" in records[2] and "features/cls_rankme" in records[2]
    html = (alone / "report.html").read_text()
    assert "agreement" in html and "patch_consistency" in html and "Starts from networks of first after step 6" in html
    assert "networks of first after step 6" in json.loads((alone / "run.json").read_text())["stages"]["second"]["message"]
    assert (alone / "second" / "pictures" / "pca-000000002.png").is_file()


def test_toy__accumulation_and_unknown_keys(make_corpus_once, tmp_path):
    config = load_config(PretrainConfig, [RECIPE], ["stages.first.accumulation=2", "stages.first.steps=2"])
    run_pretraining(config, make_corpus_once, tmp_path / "run", ["first"])
    assert len(trace(tmp_path / "run", "first")) == 2
    with pytest.raises(ConfigError, match=r"stages\.first\.method\.size_p'.*size_px"):
        load_config(PretrainConfig, [RECIPE], ["stages.first.method.size_p=3"])


def test_toy__killed_and_run_again_is_the_same_to_the_bit(alone, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    process = Started(command(make_corpus_once, run), cwd=ROOT)
    metrics = run / "first" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_pretraining(load_config(PretrainConfig, [RECIPE]), make_corpus_once, run)
    for stage in ("first", "second"):
        assert trace(run, stage) == trace(alone, stage)
        assert last_state(run, stage) == last_state(alone, stage)


@pytest.mark.distributed
def test_toy__two_processes(make_corpus_once, tmp_path, run_ranks):
    arguments = [str(RECIPE), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--stage", "first"]
    run_ranks(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {COMMAND} sys.exit(main({arguments!r}))", timeout_s=240)
    records = trace(tmp_path / "run", "first")
    assert len(records) == 6 and not any(record["skipped"] for record in records)


def test_toy__is_exported_and_evaluated(alone, tmp_path):
    from meddino_evaluation.classification.fake_data import make_fake
    from meddino_evaluation.cli import main

    model = export_model(alone, tmp_path / "model")
    assert json.loads((model / "config.json").read_text())["weights"]["role"] == "backbone"
    make_fake("ct_contrast", tmp_path / "data", 6)
    quick = ["features.image_size_px=32", "features.device=cpu", "split.repeats=1", "statistics.resamples=50"]
    given = [
        "--model",
        str(model),
        "--data",
        "ct_contrast",
        "--root",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "results"),
    ]
    assert main(["knn", *given, *quick]) == 0
    assert (tmp_path / "results" / "report.html").is_file()
