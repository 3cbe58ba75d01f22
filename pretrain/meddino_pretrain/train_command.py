"""What `meddino-pretrain RECIPE` takes and does."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.core.command import write_line
from meddino.core.errors import ConfigError
from meddino.data.remote import corpus_location
from meddino.distributed.launcher import LAUNCHER_PID, is_launched, launch
from meddino_pretrain.run.signals import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped one: smoke, demo, cpu_small, ct3m_vitb, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the recipe")
    parser.add_argument(
        "--corpus",
        type=corpus_location,
        action="append",
        required=True,
        help="folder written by meddino-curate, or its URL; several: one --corpus each (weights: corpus.sampling)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, new or begun")
    parser.add_argument("--stage", action="append", default=[], help="only this stage (may be given several times)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of this machine that train together, e.g. one a GPU"
    )
    parser.add_argument(
        "--branch-from",
        type=Path,
        metavar="CHECKPOINT",
        help="begin this new run at a checkpoint of another (or at a run's newest): more steps, a lower lr, ...",
    )
    plan = parser.add_argument_group("plan", "check everything and say what it takes, without computing")
    plan.add_argument("--plan", action="store_true", help="print slices, memory, hours and checkpoints of each stage")
    plan.add_argument(
        "--machine", metavar="NxP[xGPU]", help="for these machines: nodes x processes x kind of GPU, e.g. 4x8xh100"
    )
    plan.add_argument("--corpus-comes", action="store_true", help="the corpus is still being made")
    plan.add_argument("--warn-disk", action="store_true", help="a lack of room on the disk is a line of the plan, no refusal")


def run(argv: Sequence[str], arguments: argparse.Namespace) -> int | None:
    """Train, or say what it would take."""
    if arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes} must be at least 1")
    if not arguments.plan and (arguments.machine or arguments.corpus_comes or arguments.warn_disk):
        raise ConfigError("--machine, --corpus-comes and --warn-disk belong to --plan")
    if arguments.plan:
        _plan(arguments)
        return None
    if arguments.branch_from is not None and _is_first():
        _branch(arguments)
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
    if _is_first():
        report = arguments.out / "report.html"  # saving.report=false writes none
        shown = report if report.is_file() else arguments.out
        write_line(f"done: {shown}   next: meddino-export {arguments.out} --out MODEL")
    return None


def _branch(arguments: argparse.Namespace) -> None:
    from meddino.core.config import load_config
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.run.branch import branch_run

    config = load_config(PretrainConfig, [arguments.recipe], arguments.overrides, kind="pretrain")
    branch_run(arguments.branch_from, arguments.out, config)


def _is_first() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _plan(arguments: argparse.Namespace) -> None:
    from meddino.core.config import load_config
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.plan import named_machine, show_plan, this_machine
    from meddino_pretrain.run.branch import find_branch

    config = load_config(PretrainConfig, [arguments.recipe], arguments.overrides, kind="pretrain")
    # With --corpus-comes other jobs run before this one, which may be the other run's.
    if arguments.branch_from is not None and not arguments.corpus_comes:
        point = find_branch(arguments.branch_from, arguments.out, config)
        if point is not None:
            write_line(f"branch: from {point.run}, {point.stage} after step {point.checkpoint.step}")
    machine = named_machine(arguments.machine) if arguments.machine else this_machine(config, arguments.processes)
    assumed = (arguments.corpus_comes, arguments.warn_disk)
    for line in show_plan(config, arguments.corpus, arguments.out, arguments.stage, machine, *assumed):
        write_line(line)
