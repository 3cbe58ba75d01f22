"""`meddino-pretrain bench loader`: one JSON line about this machine; `bench step` is `bench_step.py`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import command_parser, run_command


def main(argv: Sequence[str]) -> int:
    """Run `bench loader` and return its exit code."""
    parser = command_parser(
        "meddino-pretrain bench loader",
        "Measure how many slices a second are decoded, cropped and brought to the device; prints one JSON line.",
        "meddino-pretrain bench loader --global-size 256 --local-size 112 --locals 8",
    )
    parser.add_argument("--corpus", type=Path, help="measure on this corpus; on slices made up in memory if left out")
    parser.add_argument("--global-size", type=int, default=256, help="side of the global crops [px]")
    parser.add_argument("--local-size", type=int, default=112, help="side of the local crops [px]")
    parser.add_argument("--locals", type=int, default=8, help="local crops of each slice")
    parser.add_argument("--batch", type=int, default=16, help="slices in a batch")
    parser.add_argument("--steps", type=int, default=4, help="batches measured")
    parser.add_argument("--workers", type=int, default=0, help="processes of the loader in the last measurement")
    return run_command(parser, argv, _bench_loader)


def _bench_loader(arguments: argparse.Namespace) -> None:
    from meddino.data.corpus import Corpus
    from meddino_pretrain.bench_loader import SyntheticSlices, bench_loader
    from meddino_pretrain.crops import CropsConfig, CropSizes

    crops = CropsConfig(
        sizes=(CropSizes(global_px=arguments.global_size, local_px=arguments.local_size),), num_local=arguments.locals
    )
    source = Corpus(arguments.corpus) if arguments.corpus else SyntheticSlices()
    figures = bench_loader(source, crops, batch=arguments.batch, steps=arguments.steps, workers=arguments.workers)
    sys.stdout.write(json.dumps(figures) + "\n")
