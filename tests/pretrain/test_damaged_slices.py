"""Damaged slices are counted over a whole run: it stops at the same step however many processes and interruptions it has."""

from pathlib import Path

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.corrupt_samples import CorruptSamples
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.run.checkpoints import corrupt_keys, last_checkpoint
from meddino_pretrain.run.signals import StopRequest
from meddino_pretrain.stages import run_pretraining

from meddino.core.config import load_config
from meddino.core.errors import ShardError, StoppedEarly
from meddino.core.seeds import derive_seed

TINY = Path(__file__).with_name("tiny.yaml")
FIRST, SECOND = "stage1_pretrain", "stage2_gram"
# A save at the stage's end alone, so that what is found was saved because the run stopped.
BASE = ["loader.max_corrupt=2", "saving.every_steps=100"]
IN_TWO = """
    import sys
    from meddino_pretrain.cli import main
    sys.exit(main({arguments!r}) != 2)
"""


@pytest.fixture
def damaged(make_corpus):
    """A corpus with three damaged slices, met first in the steps 0, 2 and 4 of stage 1."""
    corpus = make_corpus(count=24)
    order = SampleOrder(derive_seed(0, "stage", FIRST), 24, 4)
    # From the step's first half and from its second: with two processes, each meets some of them.
    chosen = [order.slices_for_step(step)[place] for step, place in ((0, 0), (2, 3), (4, 0))]
    for index in chosen:
        shard = corpus.root / "shards" / corpus.slices.column("shard")[index].as_py()
        data = bytearray(shard.read_bytes())
        data[corpus.slices.column("offset")[index].as_py() + 40] ^= 0xFF
        shard.write_bytes(bytes(data))
    return corpus.root, sorted(corpus.key(index) for index in chosen)


def train(corpus: Path, run: Path, *overrides: str, stages=(FIRST,)) -> None:
    run_pretraining(load_config(PretrainConfig, [TINY], [*BASE, *overrides]), corpus, run, stages)


def stood_at(run: Path) -> tuple[int, list[str]]:
    """The step that the run stopped after, by its trace and its checkpoint, and the damaged slices it knows."""
    saved = last_checkpoint(run / FIRST)
    assert len(read_metrics(run / FIRST / "metrics.jsonl")) == saved.step
    return saved.step, list(corrupt_keys(saved))


def test_limit__alone_interrupted_and_in_two_processes(damaged, tmp_path, run_ranks, monkeypatch):
    corpus, keys = damaged
    with pytest.raises(ShardError, match=r"3 corrupt samples of corpus .* loader.max_corrupt allows 2: s0") as caught:
        train(corpus, tmp_path / "alone")
    assert "\n" not in str(caught.value)
    assert stood_at(tmp_path / "alone") == (5, keys)

    asked: list[int] = []
    with monkeypatch.context() as patch:
        # Asked before the stage, then in each step.
        patch.setattr(StopRequest, "came", lambda self: asked.append(1) or len(asked) == 1 + 4)
        with pytest.raises(StoppedEarly):
            train(corpus, tmp_path / "interrupted")
    with pytest.raises(ShardError):
        train(corpus, tmp_path / "interrupted")
    assert stood_at(tmp_path / "interrupted") == (5, keys)

    run = tmp_path / "two"
    run_ranks(IN_TWO.format(arguments=[str(TINY), "--corpus", str(corpus), "--out", str(run), "--stage", FIRST, *BASE]))
    assert stood_at(run) == (5, keys)


def test_limit__stops_at_once_when_run_again_and_goes_on_when_raised(damaged, tmp_path):
    (corpus, keys), run = damaged, tmp_path / "run"
    for _ in range(2):
        with pytest.raises(ShardError):
            train(corpus, run)
        assert stood_at(run) == (5, keys)
    train(corpus, run, "loader.max_corrupt=3")
    assert stood_at(run)[0] == 6
    with pytest.raises(ShardError, match="3 corrupt samples"):  # a later stage counts on
        train(corpus, run, stages=[SECOND])


def test_corrupt_samples__are_told_once(caplog):
    met = CorruptSamples("corpus", 1, ["a"])
    met.add([("a", "a is damaged"), ("b", "b is damaged"), ("b", "b is damaged")])
    assert met.keys == {"a", "b"} and met.error() is not None and CorruptSamples("corpus", 2, ["a", "b"]).error() is None
    assert caplog.text.count("is damaged") == 1 and "b is damaged" in caplog.text
