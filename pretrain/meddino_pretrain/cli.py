"""`meddino-pretrain`: train a recipe on a corpus; the same command again goes on."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import command_parser, run_command
from meddino.core.errors import ConfigError
from meddino.data.remote import corpus_location
from meddino.distributed.launcher import LAUNCHER_PID, is_launched, launch
from meddino_pretrain.run.signals import stop_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    if arguments[:1] == ["show"]:
        from meddino_pretrain.show import main as show

        return show(arguments[1:])
    parser = command_parser(
        "meddino-pretrain",
        "Train a recipe's stages on a corpus, one after the other. The same command again goes on where it stopped. "
        "`meddino-pretrain show RECIPE` prints a recipe in full; `meddino-pretrain bench step|loader` measures.",
        "meddino-pretrain smoke --corpus corpus --out run stages.stage1_pretrain.steps=20",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped one: smoke, demo, cpu_small, ct3m_vitb, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the recipe")
    parser.add_argument("--corpus", type=corpus_location, required=True, help="folder written by meddino-curate, or its URL")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, new or begun")
    parser.add_argument("--stage", action="append", default=[], help="only this stage (may be given several times)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of this machine that train together, e.g. one a GPU"
    )
    return run_command(parser, arguments, functools.partial(_pretrain, arguments))


def _bench(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["loader"]:
        from meddino_pretrain.bench.loader import main as bench_loader

        return bench_loader(arguments[1:])
    if arguments[:1] == ["step"]:
        from meddino_pretrain.bench.step import main as bench_step

        return bench_step(arguments[1:])
    parser = command_parser("meddino-pretrain bench", "Measure speed; one JSON line.", "meddino-pretrain bench step --help")
    parser.add_argument("what", choices=("step", "loader"), help="whole training steps, or reading and cropping slices")
    return run_command(parser, arguments[:1], lambda _: None)  # says what is allowed


def _pretrain(argv: Sequence[str], arguments: argparse.Namespace) -> int | None:
    if arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes} must be at least 1")
    if arguments.processes > 1 and LAUNCHER_PID not in os.environ:
        if is_launched(os.environ):
            raise ConfigError(
                f"torchrun or srun has started this process as one of several; --processes {arguments.processes} too?"
            )
        return launch([sys.executable, "-m", "meddino_pretrain.cli", *argv], arguments.processes)
    with stop_on_signals() as stop:  # before the imports, which take seconds
        from meddino.core.config import load_config
        from meddino_pretrain.config import PretrainConfig
        from meddino_pretrain.stages import run_pretraining

        config = load_config(PretrainConfig, [arguments.recipe], arguments.overrides, kind="pretrain")
        run_pretraining(config, arguments.corpus, arguments.out, arguments.stage, stop)
    return None


if __name__ == "__main__":
    sys.exit(main())
