"""Feature distillation to the backbone that a stage began with."""

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods.dinov3.network import InitialTokens
from meddino_pretrain.monitoring.metrics import read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.checkpoints.state.verify import latest_checkpoint
from meddino.core.config import load_config
from meddino.losses.gram import gram_loss
from meddino.models.backbone import BackboneOutput

STAGE = "stage1_pretrain"


def test_distill_to_init__l2_equals_a_loop_over_what_the_student_sees():
    torch.manual_seed(0)
    seen = BackboneOutput(torch.randn(2, 5), torch.randn(2, 0, 5), torch.randn(2, 4, 5), (2, 2))
    cls_token, patches = torch.randn(2, 5), torch.randn(2, 4, 5)
    masks = torch.tensor([[True, False, False, True], [False, False, False, False]])
    of_cls = sum((seen.cls_token[i, d] - cls_token[i, d]) ** 2 for i in range(2) for d in range(5)) / 10
    visible = [(i, n) for i in range(2) for n in range(4) if not masks[i, n]]
    of_patches = sum(((seen.patch_tokens[i, n] - patches[i, n]) ** 2).sum() / 5 for i, n in visible) / len(visible)
    torch.testing.assert_close(InitialTokens("l2", cls_token, patches).loss(seen, masks), of_cls + of_patches)
    torch.testing.assert_close(
        InitialTokens("gram", cls_token, patches).loss(seen, masks), gram_loss(seen.patch_tokens, patches)
    )


@pytest.mark.parametrize("kind", ["l2", "gram"])
def test_distill_to_init__is_a_term_and_part_of_the_checkpoint(kind, request, make_corpus_once, tmp_path):
    losses = f"stages.{STAGE}.method.losses"
    overrides = [f"{losses}.distill_to_init={kind}", f"{losses}.distill_to_init_weight=2.0", f"stages.{STAGE}.steps=3"]
    config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], overrides)
    run_pretraining(config, make_corpus_once, tmp_path, [STAGE])
    records = read_metrics(tmp_path / STAGE / "metrics.jsonl")
    assert all(record["distill_to_init"] > 0 for record in records)
    kept = read_tensors(latest_checkpoint(tmp_path / STAGE / "checkpoints").folder, "initial_teacher.")
    teacher = read_tensors(latest_checkpoint(tmp_path / STAGE / "checkpoints").folder, "teacher.backbone.")
    assert kept.keys() == teacher.keys() and not torch.equal(kept["norm.weight"], teacher["norm.weight"])
