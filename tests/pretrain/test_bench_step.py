"""`bench step` on a small size: one JSON line, and the arithmetic counted by hand."""

import argparse
import json

import jaxtyping
import pytest
import torch
from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.commands import step as main
from meddino_pretrain.bench.step import MeasuredStep, StepSize, bench_step, build_method, step_size
from meddino_pretrain.methods.base import shapes_of
from meddino_pretrain.monitoring.speed import parameter_counts
from torch import nn

from meddino.core.device import find_machine
from meddino.layers.projection_head import ProjectionHead
from meddino.models.registry import build_backbone

MACHINE = find_machine("cpu")
SMALL = ["--backbone", "vitnano8", "--batch", "2", "--global-size", "16", "--local-size", "8", "--locals", "2"]


@pytest.mark.parametrize("extra", [[], ["--gram", "--checkpointing", "--drop-path", "0.3"]])
def test_main__prints_one_json_line(capsys, extra):
    threads = torch.get_num_threads()
    assert main([*SMALL, "--prototypes", "64", "--steps", "2", "--threads", "1", *extra]) == 0
    torch.set_num_threads(threads)
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    for key in ("s_per_step_min", "s_per_step_median", "peak_mib", "tflops", "share_of_peak"):
        assert figures[key] > 0
    assert figures["s_per_step_min"] <= figures["s_per_step_median"]
    assert figures["gram"] == bool(extra)


@pytest.mark.parametrize("wrong", [["--batch", "1"], ["--global-size", "20"], ["--steps", "0"], ["--backbone", "vit"]])
def test_main__wrong_numbers_exit_2(capsys, wrong):
    threads = torch.get_num_threads()
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | {wrong[0]: wrong[1]}
    assert main([*(word for pair in given.items() for word in pair), "--threads", "1"]) == 2
    torch.set_num_threads(threads)
    assert len(capsys.readouterr().err.splitlines()) == 1


def size_of(*options: str) -> StepSize:
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    return step_size(parser.parse_args([*SMALL, "--prototypes", "64", *options]))


def test_flops__counted_by_hand():
    size = size_of("--locals", "3")
    step = MeasuredStep(size, MACHINE)
    masked = len(step.batches[0].extras["mask_indices"])

    def backbone(images, tokens):
        patches = tokens - 5
        linear = 4 * tokens * (3 + 1 + 4 + 4) * 128 * 128  # blocks: qkv, proj, fc1, fc2
        attention = 4 * 2 * tokens * tokens * 128
        return 2 * images * (linear + attention + patches * 192 * 128)

    def head(rows):
        return 2 * rows * (128 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 64)

    of_global = backbone(4, 9) + head(4) + head(masked)
    of_local = backbone(6, 6) + head(6)
    assert shapes_of(lambda: build_method(size, MACHINE)).flops(step.batches[0]) == 4 * of_global + 3 * of_local


def test_bench_step__loss_falls():
    size = size_of()
    first, later = bench_step(size, 1, MACHINE)["loss"], bench_step(size, 12, MACHINE)["loss"]
    assert later < first


def test_flops__agree_with_fvcore(monkeypatch):
    from fvcore.nn import FlopCountAnalysis

    class Pass(torch.nn.Module):
        """What one forward pass of a crop group computes; fvcore traces, so inputs and outputs are tensors."""

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, crops, masked):
            seen = self.network.backbone(crops)
            return self.network.dino_head(seen.cls_token), self.network.ibot_head(masked)

    def attention(inputs, outputs):  # fvcore 0.1.5 does not know it: two products of [tokens, tokens, dim] a head
        batch, heads, tokens, dim = inputs[0].type().sizes()
        return 2 * batch * heads * tokens * tokens * dim

    def counted(crops, masked):
        counter = FlopCountAnalysis(Pass(step.method.student.eval()), (crops, torch.zeros(masked, 128)))
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.set_op_handle("aten::scaled_dot_product_attention", attention)
        counts = counter.by_operator()
        products = sum(counts[name] for name in ("conv", "linear", "scaled_dot_product_attention"))
        assert set(counts) - {"conv", "linear", "scaled_dot_product_attention"} == {"layer_norm"}  # no product
        return 2 * products  # fvcore counts a multiplication and an addition as one

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # while a graph is traced, sizes are no integers
    size = size_of("--global-size", "32", "--local-size", "16")
    step = MeasuredStep(size, MACHINE)
    views, masked = step.batches[0].views, len(step.batches[0].extras["mask_indices"])
    expected = 4 * counted(views["global_crops"], masked) + 3 * counted(views["local_crops"], 0)
    assert shapes_of(lambda: build_method(size, MACHINE)).flops(step.batches[0]) == pytest.approx(expected, rel=1e-6)


def test_parameter_counts__of_each_part():
    student = nn.ModuleDict({"backbone": build_backbone("vitnano8"), "head": ProjectionHead(128, 64, 32, 16)})
    wanted = {name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()}
    assert parameter_counts(student) == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "step", "--threads", "0"], "0 threads; at least 1 is needed"),
        (["bench", "step", "--threads", "-2"], "-2 threads; at least 1 is needed"),
        (["bench", "foo"], "choose from 'step', 'loader'"),
        (["bench"], "required: what"),
        (["bench", "loader", "--batch", "0"], "loader"),
        (["bench", "loader", "--workers", "-1"], "loader"),
        (["bench", "loader", "--slice-size", "0"], "loader"),
    ],
)
def test_bench__wrong_words_are_one_line_and_2(words, said, capsys):
    from meddino_pretrain.cli import main

    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert said in error[0]
