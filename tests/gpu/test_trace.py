"""What a step costs a GPU, by `tests.gpu.trace_step`: budgets that only fall, and memory of every shipped recipe."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import step_size
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.augmentations import apply_ct, draw_ct
from meddino_pretrain.data.config import CTAugment

from meddino.core.config import load_config
from meddino.core.seeds import numpy_rng
from meddino.data.intensity import CTIntensity
from tests.gpu.tiny import tiny_size
from tests.gpu.trace_step import figures_at_depth, figures_of, recipe_size, trace_step, with_crops
from tests.gpu.tracing import Ledger, meta_device

# Recipe, processes, memory of the card that its comments name [bytes]; stage, what is changed.
NAMED = [("single_gpu", 1, 24e9), ("ct3m_vits", 2, 80e9), ("ct3m_vitb", 2, 80e9), ("ct3m_vitl", 2, 80e9)]
STAGES = ("stage1_pretrain", "stage2_gram", "stage3_highres")
WITHOUT = ["machine.activation_checkpointing=false"]
CARDS = [(*each, stage, []) for each in NAMED for stage in STAGES]
CARDS += [("ct3m_vitl", 8, 80e9, stage, WITHOUT) for stage in STAGES[:2]]
# The published trainer's own step (facebookresearch/dinov3 at 6876159) under the same count, 65,536 prototypes, 8 local crops,
# drop path 0.2: kernels, GB touched, the same as it compiles, peak GB, peak GB with full checkpointing; by backbone, slices,
# side of global, local and Gram teacher's crops [px].
THEIRS = {
    ("vitl16", 64, 256, 112, None): (7920, 804.3, 544.0, 67.43, 15.27),
    ("vitb16", 64, 256, 112, None): (4224, 355.0, 233.8, 29.38, 9.82),
    ("vitb16", 64, 256, 112, 512): (5082, 527.2, 346.7, 30.02, 10.46),
    ("vitb16", 16, 768, 336, 1152): (5082, 980.5, 635.5, 61.38, 19.96),
}
# For torch's context, fragmentation and NCCL's buffers.
SPARE = 0.92


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, False), (2, "selective")])
def test_trace__one_copy_each_way_and_no_other_wait(accumulation, checkpointing):
    figures = figures_of(trace_step(tiny_size(accumulation), checkpointing))
    assert figures["host_waits"] == 0
    # Drop path's indices, in KoLeo's pass over the micro-batches too; the numbers of the step's record.
    passes = 1 if accumulation == 1 else 2 * accumulation
    assert figures["device_copies"] == {"to device": passes, "to host": 1}
    assert figures["kernels"] < 2200 * accumulation
    assert figures["gb_touched_compiled"] <= figures["gb_touched"]


def test_apply_ct__is_a_few_kernels_whatever_the_number_of_views():
    contract, rng = CTIntensity(), numpy_rng(0, "rows")
    rows = torch.from_numpy(np.concatenate([draw_ct(CTAugment(), contract, rng, 10) for _ in range(64)]))
    with meta_device(ledger := Ledger()):
        apply_ct(torch.empty(640, 112, 112, dtype=torch.int16, device="meta"), rows, contract)
    assert ledger.kernels.total() <= 25 and ledger.copies.total() == 1 and not ledger.waits


def test_trace__losses_compute_in_float32_but_for_products():
    ledger = trace_step(tiny_size(), compiled=False)
    narrow = {
        (file, name)
        for file, name, dtype in ledger.dtypes
        if file.startswith("meddino/losses/") and dtype not in (torch.float32, torch.float64)
    }
    # What a product takes and gives is bfloat16; all else, the sums of what is backward included, is not.
    assert {name for _, name in narrow} <= {"_to_copy", "mm"}, narrow
    assert {file for file, _ in narrow} == {"meddino/losses/prototype_cross_entropy.py", "meddino/losses/sinkhorn.py"}


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
@pytest.mark.parametrize("column", THEIRS)
def test_trace__touches_and_holds_less_than_the_published_trainer(column):
    backbone, batch, global_px, local_px, gram_px = column
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    words = ["--backbone", backbone, "--batch", batch, "--global-size", global_px, "--local-size", local_px, "--locals", 8]
    words += ["--drop-path", 0.2, *["--gram"] * (gram_px is not None)]
    size = step_size(parser.parse_args([str(word) for word in words]))
    size = size if gram_px is None else with_crops(size, gram_px=gram_px)
    kernels, touched, compiled, peak, checkpointed = THEIRS[column]
    ours = figures_at_depth(size)
    assert ours["kernels"] < 0.9 * kernels and ours["gb_touched"] < 0.9 * touched, ours
    assert ours["gb_touched_compiled"] < 0.9 * compiled and ours["peak_gb"] < 0.9 * peak, ours
    assert figures_at_depth(size, True)["peak_gb"] < 0.7 * checkpointed


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_figures__grow_by_the_same_with_every_block(checkpointing):
    size = replace(tiny_size(), changes={"drop_path": 0.3, "depth": 4})
    whole = figures_of(trace_step(size, checkpointing))
    for name, value in figures_at_depth(size, checkpointing, (1, 2)).items():
        assert value == pytest.approx(whole[name], rel=0.01), name  # which rows drop path keeps differs a little


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("recipe", "processes", "memory", "stage", "overrides"), CARDS)
def test_recipe__fits_the_card_that_it_names(recipe, processes, memory, stage, overrides):
    config = load_config(PretrainConfig, [recipe], ["init.weights=scratch", *overrides], kind="pretrain")
    figures = figures_at_depth(recipe_size(config, stage, processes), config.machine.activation_checkpointing)
    assert 1e9 * figures["peak_gb"] < SPARE * memory, figures
