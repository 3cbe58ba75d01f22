"""The benchmark itself runs; its figures are printed by the script and not asserted here."""

import argparse

from meddino_pretrain.bench.commands import add_size_arguments
from meddino_pretrain.bench.step import StepSize, step_size

from tests.benchmarks.bench_step_parts import as_table, backbone_parts, loss_parts, update_parts


def small_size(*options: str) -> StepSize:
    """What a step holds, by the benchmark's own options."""
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    return step_size(parser.parse_args(["--backbone", "vitnano8", *options]))


def test_as_table__one_line_for_each_thing():
    size = small_size("--batch", "2", "--global-size", "32", "--local-size", "16", "--locals", "2", "--prototypes", "64")
    lines = list(as_table([*backbone_parts(size, compiled=False), *loss_parts(size), *update_parts(size)], repeats=1))
    assert len(lines) == 10
    assert all(float(line.split()[-5 if line.endswith("-") else -6]) >= 0 for line in lines[1:])
