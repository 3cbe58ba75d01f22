"""One process, several (DDP, FSDP2) and gradient accumulation take the same steps.

In float32 with tiny.yaml's LayerScale of 1; at the recipes' own 1e-5 in float64, and in float32 from weights that have
learnt for some steps. A fresh backbone at 1e-5 gives all images nearly one CLS token. KoLeo's gradients there, one over the
tokens' distance, are some 100,000 and cancel in the sum over the batch: added in another order, the gradients of cls_token
and of the last norm's weight agree in two digits only (all others in six), and Adam makes a step of the learning rate of
whatever a gradient's size. In float32 the weights of two such runs lie 1.6e-4 apart after 20 steps (1.3e-7 without KoLeo), 4e-6
if the first two steps are the same and 3e-7 if the first five are; in float64 1e-12.
"""

import contextlib
import socket
from pathlib import Path

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.config import load_config

TINY = Path(__file__).with_name("tiny.yaml")
STAGES = ["stage1_pretrain", "stage2_gram"]
BASE = ["stages.stage1_pretrain.steps=20", "stages.stage2_gram.steps=3", "saving.every_steps=7"]
# Several runs one after the other in the same processes: starting those takes most of the time.
CODE = """
    import os
    from pathlib import Path
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config
    for port, run, stages, overrides in {runs!r}:
        os.environ["MASTER_PORT"] = port  # the one before may not have let go of its own yet
        run_pretraining(load_config(PretrainConfig, [{recipe!r}], overrides), Path({corpus!r}), Path(run), stages)
"""

# The LayerScale that every recipe begins with.
FRESH = ["backbone.changes.layerscale_init=1e-5"]
IN_FLOAT64 = [*FRESH, "machine.precision=fp64"]


def run_alone(corpus: Path, run: Path, *overrides: str, stages=STAGES) -> Path:
    run_pretraining(load_config(PretrainConfig, [TINY], [*BASE, *overrides]), corpus, run, stages)
    return run


def compare(run: Path, reference: Path, stages=STAGES, within: float = 1e-5, weights_within: float | None = None) -> None:
    """Losses and weights of two runs."""
    for stage in stages:
        found, wanted = (read_metrics(folder / stage / "metrics.jsonl") for folder in (run, reference))
        assert [record["step"] for record in found] == [record["step"] for record in wanted]
        for a, b in zip(found, wanted, strict=True):
            for term in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram"):
                assert (term in a) == (term in b)
                assert a.get(term, 0.0) == pytest.approx(b.get(term, 0.0), rel=within, abs=within), (stage, a["step"], term)
        ours, theirs = (
            read_tensors(latest_checkpoint(folder / stage / "checkpoints").folder, "teacher.") for folder in (run, reference)
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=weights_within or within, rtol=within, msg=f"{stage} {name}")


@pytest.fixture
def free_ports():
    """A function that returns some ports that nobody listens at."""

    def find(count: int) -> list[str]:
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(socket.socket()) for _ in range(count)]
            for one in found:
                one.bind(("127.0.0.1", 0))
            return [str(one.getsockname()[1]) for one in found]

    return find


@pytest.fixture(scope="module")
def reference(tmp_path_factory, make_corpus_once):
    return run_alone(make_corpus_once, tmp_path_factory.mktemp("one") / "run")


def test_accumulation__four_micro_batches_equal_one(reference, make_corpus_once, tmp_path):
    parts = ["stages.stage1_pretrain.accumulation=4", "stages.stage2_gram.accumulation=2"]
    compare(run_alone(make_corpus_once, tmp_path / "run", *parts), reference)


@pytest.fixture(scope="module")
def exact_reference(tmp_path_factory, make_corpus_once):
    return run_alone(make_corpus_once, tmp_path_factory.mktemp("exact") / "run", *IN_FLOAT64, stages=STAGES[:1])


def test_accumulation__fresh_backbone_in_float64(exact_reference, make_corpus_once, tmp_path):
    overrides = [*IN_FLOAT64, "stages.stage1_pretrain.accumulation=4"]
    run = run_alone(make_corpus_once, tmp_path / "run", *overrides, stages=STAGES[:1])
    compare(run, exact_reference, STAGES[:1], within=1e-9)


@pytest.fixture(scope="module")
def continued(tmp_path_factory, make_corpus_once):
    """Overrides that start from what a run from scratch has learnt, and the run of one process that does so."""
    folder = tmp_path_factory.mktemp("continued")
    first = run_alone(make_corpus_once, folder / "first", *FRESH, "stages.stage1_pretrain.steps=10", stages=STAGES[:1])
    overrides = [*FRESH, f"init.weights={first}"]
    return overrides, run_alone(make_corpus_once, folder / "run", *overrides, stages=STAGES[:1])


def test_accumulation__continued_backbone_in_float32(continued, make_corpus_once, tmp_path):
    overrides, reference = continued
    run = run_alone(make_corpus_once, tmp_path / "run", *overrides, "stages.stage1_pretrain.accumulation=4", stages=STAGES[:1])
    # AdamW divides by second moments near zero: on some processors 4 of 16,384 weights of one layer differ by up to 1.3e-5.
    compare(run, reference, STAGES[:1], weights_within=3e-5)


def run_two(run_ranks, free_ports, corpus: Path, parallel: str, runs: dict[Path, tuple[list[str], list[str]]]) -> None:
    """Make runs, each of some stages with some overrides, in two processes."""
    given = [
        (port, str(run), stages, [*BASE, f"machine.parallel={parallel}", *overrides])
        for port, (run, (stages, overrides)) in zip(free_ports(len(runs)), runs.items(), strict=True)
    ]
    run_ranks(CODE.format(runs=given, recipe=str(TINY), corpus=str(corpus)), timeout_s=240)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_processes__two_equal_one(parallel, reference, exact_reference, make_corpus_once, tmp_path, run_ranks, free_ports):
    runs = {tmp_path / "float32": (STAGES, []), tmp_path / "float64": (STAGES[:1], IN_FLOAT64)}
    run_two(run_ranks, free_ports, make_corpus_once, parallel, runs)
    compare(tmp_path / "float32", reference)
    compare(tmp_path / "float64", exact_reference, STAGES[:1], within=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_processes__continued_backbone_in_float32(parallel, continued, make_corpus_once, tmp_path, run_ranks, free_ports):
    overrides, reference = continued
    run_two(run_ranks, free_ports, make_corpus_once, parallel, {tmp_path / "run": (STAGES[:1], overrides)})
    compare(tmp_path / "run", reference, STAGES[:1])
