"""What `meddino-submit COMMAND ...` does: checks first, then plans, then submits."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from meddino.core.command import write_line
from meddino.core.errors import MedDINOError
from meddino_slurm import slurm
from meddino_slurm.config import SiteConfig
from meddino_slurm.plans import Planned, own_checks, plan_one, plan_parts, plan_stages, submit_planned
from meddino_slurm.status import job_ids_to_wait_for
from meddino_slurm.submission import check_free, check_same_run, on_this_machine, run_in_foreground, submit


def submit_command(arguments: argparse.Namespace, site: SiteConfig) -> None:
    """Submit a command, show what would be submitted, or run it here.

    Raises:
        MedDINOError: There is no SLURM, the partition is unknown, the folder is held by another job, ...
        SystemExit: With the command's exit code, for the debug executor.
    """
    executor = arguments.executor
    if executor == "slurm" and not arguments.dry_run:
        slurm.check_slurm()
        slurm.check_partition(site.partition_for(arguments.command))
    if not arguments.unchecked:
        waits = bool(arguments.after)
        said = own_checks(site, arguments.command, arguments.arguments, waits, show_only=arguments.dry_run)
        write_line("".join(f"# {line}\n" for line in said.splitlines()), end="")
    planned = _plan(arguments, site)
    if executor != "slurm":
        planned = _for_this_machine(planned, site, arguments)
    if not arguments.dry_run:
        for each in planned:
            check_same_run(each.works[0])
        check_free([work for each in planned for work in each.works])
        if executor == "debug":
            raise SystemExit(run_in_foreground(planned[0].works[0]))
    after = [job_id for what in arguments.after for job_id in job_ids_to_wait_for(what)]

    def submit_one(each: Planned, dependency: Sequence[str]) -> str:
        return submit(site, each.works, executor, each.name, dependency, show_only=arguments.dry_run)

    job_ids = submit_planned(planned, submit_one, after)
    if not arguments.dry_run:
        out = planned[0].works[0].out
        for each, job_id in zip(planned, job_ids, strict=True):
            write_line(f"{job_id}\t{each.name}")
        write_line(f"follow with: meddino-submit logs {out} -f   ask with: meddino-submit status {out}")


def _plan(arguments: argparse.Namespace, site: SiteConfig) -> list[Planned]:
    command, given = arguments.command, arguments.arguments
    if arguments.parts is not None:
        return plan_parts(site, command, given, arguments.parts)
    if arguments.chain_stages:
        if command != "pretrain":
            raise MedDINOError(f"--chain-stages belongs to 'pretrain', not to '{command}'")
        return plan_stages(site, given)
    return plan_one(site, command, given, arguments.jobs)


def _for_this_machine(planned: Sequence[Planned], site: SiteConfig, arguments: argparse.Namespace) -> list[Planned]:
    if len(planned) > 1 or len(planned[0].works) > 1 or arguments.after:
        raise MedDINOError(
            f"--executor {arguments.executor} runs one job on this machine: leave out --parts, --chain-stages and --after"
        )
    gpus = site.resources_for(arguments.command).gpus_per_node
    return [replace(each, works=tuple(on_this_machine(work, gpus) for work in each.works)) for each in planned]
