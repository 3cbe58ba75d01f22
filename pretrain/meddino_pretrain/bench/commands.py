"""What `meddino-pretrain bench step` and `bench loader` take; what they do is imported once that is clear."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

from meddino.core.command import command_parser, run_command
from meddino.data.remote import corpus_location
from meddino_pretrain.bench import add_method_arguments


def step(argv: Sequence[str]) -> int:
    """Run `bench step` and return its exit code."""
    parser = command_parser(
        "meddino-pretrain bench step",
        "Measure whole training steps (forward, backward, clipping, optimizer, EMA) on random images; prints one JSON line.",
        "meddino-pretrain bench step --backbone vits16 --batch 4 --global-size 224 --local-size 96 --locals 8",
    )
    add_size_arguments(parser)
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("auto", "on", "off"),
        const="on",
        default="auto",
        help="run blocks, heads and losses through torch.compile; auto, as in training: on a CUDA device",
    )
    parser.add_argument("--steps", type=int, default=5, help="steps measured, after one that is not")
    parser.add_argument("--threads", type=int, default=None, help="threads of the CPU; all cores if left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return run_command(parser, argv, _run("meddino_pretrain.bench.step"))


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command say what a step holds; `step_size` reads it."""
    parser.add_argument("--backbone", default="vits16", help="name of a backbone")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--drop-path", type=float, default=0.0, help="share of samples each residual branch leaves out")
    add_method_arguments(parser)


def loader(argv: Sequence[str]) -> int:
    """Run `meddino-pretrain bench loader`: print one JSON line and return the exit code."""
    parser = command_parser(
        "meddino-pretrain bench loader",
        "Measure how many slices a second one core decodes, crops and normalises. Prints one JSON line.",
        "meddino-pretrain bench loader --corpus corpus --global-size 224 --local-size 96 --locals 8",
    )
    parser.add_argument("--corpus", type=corpus_location, help="a corpus, or its URL; without it, slices made up in memory")
    parser.add_argument("--slice-size", type=int, default=512, help="side of the slices made up [px]")
    add_method_arguments(parser)
    parser.add_argument("--patch-size", type=int, default=16, help="side of a patch [px]")
    parser.add_argument("--batch", type=int, default=16, help="slices in a batch")
    parser.add_argument("--steps", type=int, default=4, help="batches measured; the fastest counts")
    parser.add_argument("--workers", type=int, default=0, help="processes of the loader")
    return run_command(parser, argv, _run("meddino_pretrain.bench.loader"))


def check_gpu(argv: Sequence[str]) -> int:
    """Run `meddino-pretrain check-gpu` and return its exit code: 2 if a verdict is "wrong"."""
    parser = command_parser(
        "meddino-pretrain check-gpu",
        "Run first on a new GPU: tiny steps against the CPU's, compiled, in two processes, saved and resumed, then speed and "
        "memory. Prints a verdict a line; says what it left out.",
        "meddino-pretrain check-gpu",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return run_command(parser, argv, _run("meddino_pretrain.bench.check_gpu"))


def _run(module: str) -> Callable[[argparse.Namespace], None]:
    return lambda arguments: import_module(module).run(arguments)
