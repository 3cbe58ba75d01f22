"""What a step costs a GPU, by `tests.gpu.trace_step`: budgets that only fall, and memory of every shipped recipe."""

import argparse

import pytest
import torch
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import step_size
from meddino_pretrain.config import PretrainConfig

from meddino.core.config import load_config
from tests.gpu.tiny import tiny_size
from tests.gpu.trace_step import recipe_size, trace_step
from tests.gpu.tracing import Ledger, meta_device

# Recipe, processes, memory of the card that its comments name [bytes].
CARDS = [("single_gpu", 1, 24e9), ("ct3m_vits", 2, 80e9), ("ct3m_vitb", 2, 80e9), ("ct3m_vitl", 2, 80e9)]
STAGES = ("stage1_pretrain", "stage2_gram", "stage3_highres")
# For torch's context, fragmentation and NCCL's buffers.
SPARE = 0.92


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, False), (2, "selective")])
def test_trace__one_copy_each_way_and_no_other_wait(accumulation, checkpointing):
    figures = trace_step(tiny_size(accumulation), checkpointing).figures()
    assert figures["host_waits"] == 0
    # Drop path's indices, in KoLeo's pass over the micro-batches too; the numbers of the step's record.
    passes = 1 if accumulation == 1 else 2 * accumulation
    assert figures["device_copies"] == {"to device": passes, "to host": 1}
    assert figures["kernels"] < 2200 * accumulation
    assert figures["gb_touched_compiled"] <= figures["gb_touched"]


def test_ledger__mixing_host_and_device_raises():
    with meta_device(ledger := Ledger()), pytest.raises(AssertionError, match=r"mul at .* mixes tensors of host and device"):
        torch.empty(3, device="meta") * torch.ones(3)
    assert ledger.kernels.total() == 0


def test_ledger__counts_what_a_kernel_must_touch():
    with meta_device(ledger := Ledger()):
        left, right = torch.empty(10, 10, device="meta"), torch.empty(10, device="meta")
        ledger.start()
        kept = left + right  # 400 + 40 read, 400 written
        kept[:5].mul_(2.0)  # 200 read, 200 written
        kept.view(100)  # free
        assert float(kept.sum()) == 1.0  # 400 read, 4 written; and a wait
    assert ledger.bytes["other"] == 840 + 400 + 404 and ledger.kernels["other"] == 3 and ledger.waits.total() == 1
    assert ledger.peak == 440 + 400 + 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trace__budget_of_the_issue_s_first_size():
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    words = ["--backbone", "vitl16", "--batch", "64", "--global-size", "256", "--local-size", "112", "--locals", "8"]
    size = step_size(argparse.Namespace(**vars(parser.parse_args(words)), drop_path=0.2))
    figures = trace_step(size).figures()
    assert figures["kernels"] < 6600 and figures["gb_touched"] < 860 and figures["gb_touched_compiled"] < 560
    assert figures["peak_gb"] < 62


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("recipe", "processes", "memory"), CARDS)
def test_recipe__fits_the_card_that_it_names(recipe, processes, memory, stage):
    config = load_config(PretrainConfig, [recipe], ["init.weights=scratch"], kind="pretrain")
    size = recipe_size(config, stage, processes)
    peak = trace_step(size, config.machine.activation_checkpointing).peak
    assert peak < SPARE * memory, f"{peak / 1e9:.1f} GB"
