"""Steps whose loss is not finite change nothing, are told with their samples, and end the run after too many."""

from pathlib import Path

import pytest
import torch
from meddino_pretrain import build
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.core.config import load_config
from meddino.core.errors import MedDINOError
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus

STAGE = "stage1_pretrain"


@pytest.fixture
def run_with_nan(request, make_corpus_once, tmp_path, monkeypatch):
    """Run stage 1 for four steps, checkpoints after each, with NaN in the images of some steps."""
    plain = build.to_model_input

    def run(bad_steps: set[int], *overrides: str) -> Path:
        def poisoned(raw, machine, contract):
            batch = plain(raw, machine, contract)
            if raw.step in bad_steps:
                batch.global_crops[0, 0, 0, 0] = float("nan")
            return batch

        monkeypatch.setattr(build, "to_model_input", poisoned)
        steps = [f"stages.{STAGE}.steps=4", "saving.every_steps=1", "saving.keep_last=9"]
        config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], [*steps, *overrides])
        run_pretraining(config, make_corpus_once, tmp_path / "run", [STAGE])
        return tmp_path / "run"

    return run


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run / STAGE / "checkpoints" / f"step-{step:09d}")


def test_trainer__a_nan_step_changes_nothing(run_with_nan, make_corpus_once):
    run = run_with_nan({1})
    before, after, later = state(run, 1), state(run, 2), state(run, 3)
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # student, teacher, heads and the optimizer's moments and step counts
        assert torch.equal(after[name], tensor), name
    assert not torch.equal(later["student.backbone.norm.weight"], after["student.backbone.norm.weight"])
    records = read_metrics(run / STAGE / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [False, True, False, False]
    assert records[1]["loss"] is None
    corpus = Corpus(make_corpus_once)
    order = SampleOrder(derive_seed(0, "stage", STAGE), len(corpus), 4)
    assert records[1]["keys"] == [corpus.key(index) for index in order.slices_for_step(1)]


def test_trainer__too_many_in_a_row_end_the_run(run_with_nan, tmp_path):
    with pytest.raises(
        MedDINOError, match=r"2 steps in a row up to step 3.*last samples: s0.*needs a new one \(another --out\)"
    ):
        run_with_nan({1, 2, 3}, "optimizer.max_bad_steps=2")
    records = read_metrics(tmp_path / "run" / STAGE / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [False, True, True]
    first, last = state(tmp_path / "run", 1), state(tmp_path / "run", 2)
    assert all(torch.equal(first[name], last[name]) for name in first)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "diverging: The run is diverging: 2 of the last 3 steps were skipped" in report and "http-equiv" not in report


def test_trainer__good_steps_between_bad_ones_start_the_count_again(run_with_nan):
    run = run_with_nan({0, 2}, "optimizer.max_bad_steps=2")
    assert [record["skipped"] for record in read_metrics(run / STAGE / "metrics.jsonl")] == [True, False, True, False]


def test_trainer__damaged_slices_are_counted(request, make_corpus, tmp_path, caplog):
    corpus = make_corpus(count=8, name="damaged")
    for index in (2, 5):
        shard = corpus.root / "shards" / corpus.slices.column("shard")[index].as_py()
        data = bytearray(shard.read_bytes())
        data[corpus.slices.column("offset")[index].as_py() + 40] ^= 0xFF
        shard.write_bytes(bytes(data))
    order = SampleOrder(derive_seed(0, "stage", STAGE), 8, 4)
    # Each epoch of eight slices is two steps, and meets each damaged one once.
    met = [sum(index in (2, 5) for index in order.slices_for_step(step)) for step in range(4)]

    def run(out: Path, *overrides: str) -> list[dict]:
        few = [f"stages.{STAGE}.steps=4", *overrides]
        config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], few)
        run_pretraining(config, corpus.root, tmp_path / out, [STAGE])
        return read_metrics(tmp_path / out / STAGE / "metrics.jsonl")

    counted = [record["damaged_slices"] for record in run("run")]
    # A stand-in may be the other damaged slice; then that one is stood in for as well.
    assert all(wanted <= found <= 2 * wanted for wanted, found in zip(met, counted, strict=True)) and sum(counted) >= 4
    assert [record["damaged_slices"] for record in run("again")] == counted
    assert "another stands in for it" in caplog.text
    assert f"met {sum(counted)} times" in (tmp_path / "run" / "report.html").read_text()
