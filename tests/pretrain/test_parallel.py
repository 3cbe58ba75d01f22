"""One process, several (DDP, FSDP2) and gradient accumulation take the same steps.

tiny.yaml's LayerScale begins at 1. At DINOv3's 1e-5 a fresh backbone gives all images nearly one CLS token, and KoLeo's
gradient, one over their distance, multiplies the last bit of any other order of addition: the weights of two such runs then
lie 1.6e-4 apart after 20 steps (1.3e-7 without KoLeo), and no arithmetic in the loss can mend tokens that differ already.
"""

from pathlib import Path

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.metrics import read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.safetensors_storage import read_tensors
from meddino.checkpoints.training_state import latest_checkpoint
from meddino.core.config import load_config

TINY = Path(__file__).with_name("tiny.yaml")
STAGES = ["stage1_pretrain", "stage2_gram"]
BASE = ["stages.stage1_pretrain.steps=20", "stages.stage2_gram.steps=3", "saving.every_steps=7"]
CODE = """
    from pathlib import Path
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config
    config = load_config(PretrainConfig, [{recipe!r}], {overrides!r})
    run_pretraining(config, Path({corpus!r}), Path({run!r}), {stages!r})
"""


def run_alone(corpus: Path, run: Path, *overrides: str, stages=STAGES) -> Path:
    run_pretraining(load_config(PretrainConfig, [TINY], [*BASE, *overrides]), corpus, run, stages)
    return run


def compare(run: Path, reference: Path, stages=STAGES) -> None:
    """Losses, gradient norms and weights of two runs, within 1e-5."""
    for stage in stages:
        found, wanted = (read_metrics(folder / stage / "metrics.jsonl") for folder in (run, reference))
        assert [record["step"] for record in found] == [record["step"] for record in wanted]
        for a, b in zip(found, wanted, strict=True):
            for term in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram"):
                assert (term in a) == (term in b)
                assert a.get(term, 0.0) == pytest.approx(b.get(term, 0.0), rel=1e-5, abs=1e-5), (stage, a["step"], term)
        ours, theirs = (
            read_tensors(latest_checkpoint(folder / stage / "checkpoints").folder, "teacher.") for folder in (run, reference)
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{stage} {name}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, make_corpus_once):
    return run_alone(make_corpus_once, tmp_path_factory.mktemp("one") / "run")


def test_accumulation__four_micro_batches_equal_one(reference, make_corpus_once, tmp_path):
    parts = ["stages.stage1_pretrain.accumulation=4", "stages.stage2_gram.accumulation=2"]
    compare(run_alone(make_corpus_once, tmp_path / "run", *parts), reference)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_processes__two_equal_one(parallel, reference, make_corpus_once, tmp_path, run_ranks):
    overrides = [*BASE, f"machine.parallel={parallel}"]
    run_ranks(
        CODE.format(recipe=str(TINY), overrides=overrides, corpus=str(make_corpus_once), run=str(tmp_path), stages=STAGES)
    )
    compare(tmp_path, reference)
