"""`machine.compile` changes the time a step takes, and the result by rounding."""

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
SHORT = ["stages.stage1_pretrain.steps=3", "stages.stage2_gram.steps=1"]
CODE = """
    from pathlib import Path
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config
    config = load_config(PretrainConfig, [{recipe!r}], {overrides!r})
    run_pretraining(config, Path({corpus!r}), Path({run!r}), {stages!r})
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "checkpointing"), [(1, False), (1, True), (2, True)])
def test_compile__same_losses_and_weights(make_corpus_once, tmp_path, run_ranks, monkeypatch, processes, checkpointing):
    run_pretraining(load_config(PretrainConfig, [TINY], SHORT), make_corpus_once, tmp_path / "plain", STAGES)
    compiled = [*SHORT, "machine.compile=true", f"machine.activation_checkpointing={str(checkpointing).lower()}"]
    compiled += ["machine.parallel=fsdp2"] if processes > 1 else []
    # Whatever a compiler leaves behind belongs to this test.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code = CODE.format(
        recipe=str(TINY), overrides=compiled, corpus=str(make_corpus_once), run=str(tmp_path / "run"), stages=STAGES
    )
    run_ranks(code, processes, timeout_s=800)
    for stage in STAGES:
        found, wanted = (read_metrics(tmp_path / name / stage / "metrics.jsonl") for name in ("run", "plain"))
        assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in wanted], rel=1e-4)
        ours, theirs = (
            read_tensors(latest_checkpoint(tmp_path / name / stage / "checkpoints").folder, "teacher.")
            for name in ("run", "plain")
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
