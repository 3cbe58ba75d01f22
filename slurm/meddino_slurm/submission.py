"""Handing jobs to submitit: parameters, arrays, dependencies; or only showing what would be handed over."""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger
from meddino_slurm import slurm
from meddino_slurm.config import SiteConfig, time_limit_min
from meddino_slurm.record import add_submission, held_text, holder_is_alive, now_text, read_json, submissions, versions
from meddino_slurm.steps import heartbeat_command, srun_command, visible_gpus
from meddino_slurm.supervisor import Executor, JobSupervisor
from meddino_slurm.work import Work

log = get_logger(__name__)


def sbatch_parameters(site: SiteConfig, work: Work, name: str, dependency: Sequence[str], array: bool) -> dict[str, Any]:
    """Return submitit's parameters for a job.

    Args:
        site: The site profile.
        work: The job, or one of an array's.
        name: Of the job, for squeue.
        dependency: Job ids that have to end well before.
        array: The parameters are for an array.
    """
    resources = site.resources_for(work.command)
    pattern = "%A_%a" if array else "%j"
    additional: dict[str, Any] = {
        "requeue": True,
        # The processes get it, all of them; the batch step with the supervisor does not.
        "signal": f"USR2@{site.signal_lead_s}",
        "output": str(work.folder / f"{pattern}.supervisor.log"),
        **site.sbatch,
    }
    if resources.memory_gib_per_node is not None:
        additional["mem"] = f"{resources.memory_gib_per_node}G"
    if dependency:
        additional["kill-on-invalid-dep"] = "yes"
    optional = {
        "partition": site.partition_for(work.command),
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclude": site.exclude,
        "setup": setup_lines(site) or None,
        "dependency": f"afterok:{':'.join(dependency)}" if dependency else None,
        "gpus_per_node": resources.gpus_per_node or None,
    }
    return {
        "job_name": name,
        "wckey": None,  # submitit's own name there is refused by sites that count by it
        "time": time_limit_min(resources.time),
        "nodes": work.nodes,
        "ntasks_per_node": work.tasks_per_node,
        "cpus_per_task": work.cpus_per_task,
        "array_parallelism": site.array_parallel,
        "stderr_to_stdout": True,
        # The supervisor runs in the batch step and starts the processes by srun itself.
        "use_srun": False,
        "additional_parameters": additional,
        **{key: value for key, value in optional.items() if value is not None},
    }


def setup_lines(site: SiteConfig) -> list[str]:
    """Return the profile's setup lines, the first of which makes the others count: a failed one ends the job as failed."""
    return ["set -e", *site.setup] if site.setup and site.setup_must_succeed else list(site.setup)


def check_free(works: Sequence[Work]) -> None:
    """Refuse a second job on a run folder.

    Raises:
        MedDINOError: Says which job holds it.
    """
    out = works[0].out
    active = {job["id"]: job for job in submissions(out) if job["executor"] == "slurm" and not job.get("cancelled")}
    states = slurm.job_states(active) if active else {}
    for job_id, state in states.items():
        if state in slurm.ACTIVE:
            raise MedDINOError(
                f"{out} is held by SLURM job {job_id} ({active[job_id]['name']}, {state}), submitted "
                f"{active[job_id]['submitted']}; wait for it or `meddino-submit cancel {out}`"
            )
    for path in sorted(works[0].folder.glob("lock-*.json")):
        holder = read_json(path, {})
        if holder and holder_is_alive(holder):
            raise MedDINOError(f"{held_text(path, holder)}; wait for it or `meddino-submit cancel {out}`")


def check_same_run(work: Work) -> None:
    """Refuse another recipe on a run folder that has records. What else differs, the command itself tells with every key.

    Raises:
        MedDINOError: Shows the line that goes on.
    """
    before = read_json(work.folder / f"record-{work.key}.json", {}).get("arguments")
    if before and work.command == "pretrain" and Path(before[0]).stem != Path(work.arguments[0]).stem:
        raise MedDINOError(
            f"{work.out} belongs to another run: it was started with 'meddino-submit pretrain {shlex.join(before)}'; "
            "go on with that line, or choose another --out"
        )


def submit(
    site: SiteConfig,
    works: Sequence[Work],
    executor: Executor,
    name: str,
    dependency: Sequence[str] = (),
    show_only: bool = False,
) -> str:
    """Submit one job, or several as an array.

    Returns:
        The job id; for `show_only` a placeholder.

    Raises:
        MedDINOError: SLURM refuses the job, or would for the folder's path.
    """
    array = len(works) > 1
    if executor == "slurm" and not str(works[0].folder).isprintable():
        # sbatch reads its options line by line, and where the logs go is one of them.
        raise MedDINOError(f"--out {str(works[0].out)!r} has a line break or another control character; give a path without")
    parameters = sbatch_parameters(site, works[0], name, dependency, array)
    if show_only:
        print_dry_run(works, executor, parameters)
        return f"<{name}>"
    folder = works[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    job_id = _submit_to_slurm(folder, works, parameters) if executor == "slurm" else _submit_here(folder, works[0], site)
    add_submission(
        works[0].out,
        {
            "id": job_id,
            "name": name,
            "kind": works[0].command,
            "executor": executor,
            "submitted": now_text(),
            "submitted_from": str(Path.cwd()),
            "command": list(works[0].argv),
            "keys": [work.key for work in works],
            "depends_on": list(dependency),
            **versions(),
        },
    )
    return job_id


def _submit_to_slurm(folder: Path, works: Sequence[Work], parameters: dict[str, Any]) -> str:
    import submitit

    executor = submitit.SlurmExecutor(folder=folder / "submitit")
    executor.update_parameters(**parameters)
    told = io.StringIO()  # submitit repeats sbatch's words on stderr, and then has them in its error once more
    try:
        with contextlib.redirect_stderr(told), _parsable_job_ids(submitit.SlurmExecutor):
            return _submit_works(executor, works)
    except submitit.core.utils.FailedJobError as error:
        words = "sbatch: error: "
        reasons = dict.fromkeys(line.partition(words)[2].strip() for line in str(error).splitlines() if words in line)
        raise MedDINOError(f"SLURM refuses the job: {'; '.join(reasons) or error}") from error


def job_id_of(answer: str | bytes) -> str:
    """Return the job id from what `sbatch --parsable` prints: "17" or "17;cluster" on the last such line.

    Raises:
        MedDINOError: There is none; the job may have been queued all the same.
    """
    text = answer if isinstance(answer, str) else answer.decode(errors="replace")
    found = re.findall(r"^(\d+)(?:;\S*)?$", text, re.MULTILINE)  # a site's own sbatch may print a banner as well
    if not found:
        raise MedDINOError(
            f"sbatch --parsable printed no job id but '{' '.join(text.split())}'; `squeue --me` shows whether the job is there"
        )
    return str(found[-1])


@contextlib.contextmanager
def _parsable_job_ids(executor: Any) -> Iterator[None]:
    # On submitit's own class: an array is handed over by an executor that submitit makes itself. Its pattern takes the first
    # "job N" of whatever a site's sbatch prints.
    ours = {
        "_make_submission_command": lambda _, path: ["sbatch", "--parsable", str(path)],
        "_get_job_id_from_submission_command": staticmethod(job_id_of),
    }
    before = {name: vars(executor)[name] for name in ours}
    for name, function in ours.items():
        setattr(executor, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(executor, name, function)


def _submit_works(executor: Any, works: Sequence[Work]) -> str:
    if len(works) == 1:
        return str(executor.submit(JobSupervisor(works[0], "slurm")).job_id)
    with executor.batch():
        jobs = [executor.submit(JobSupervisor(work, "slurm")) for work in works]
    return str(jobs[0].job_id).split("_")[0]


def _submit_here(folder: Path, work: Work, site: SiteConfig) -> str:
    import submitit

    executor = submitit.LocalExecutor(folder=folder / "submitit")
    minutes = time_limit_min(site.resources_for(work.command).time)
    gpus = shown_gpus()
    executor.update_parameters(
        timeout_min=minutes,
        signal_delay_s=min(site.signal_lead_s, minutes * 60 // 2),
        setup=setup_lines(site),
        # submitit hides every GPU it was not told of.
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
    )
    with _streams_to(folder / "local.log"):
        return str(executor.submit(JobSupervisor(work, "local")).job_id)


def run_in_foreground(work: Work) -> int:
    """Run a job here and now; returns its exit code."""
    import submitit

    work.folder.mkdir(parents=True, exist_ok=True)
    job = submitit.DebugExecutor(folder=work.folder / "submitit").submit(JobSupervisor(work, "debug"))
    try:
        job.result()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def shown_gpus() -> list[int]:
    """Return the numbers of the GPUs this shell shows to what it starts."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None and all(word.strip().isdigit() for word in told.split(",")):
        return [int(word) for word in told.split(",")]
    return list(range(visible_gpus()))


def on_this_machine(work: Work, gpus_per_node: int) -> Work:
    """Return the work as this one machine can run it: one process for each GPU it has and the profile asks for."""
    tasks = min(work.tasks_per_node, max(len(shown_gpus()), 1)) if gpus_per_node else work.tasks_per_node
    if (work.nodes, work.tasks_per_node) != (1, tasks):
        log.info("here: 1 machine and %d process(es) instead of %d x %d", tasks, work.nodes, work.tasks_per_node)
    return replace(work, nodes=1, tasks_per_node=tasks)


def print_dry_run(works: Sequence[Work], executor: Executor, parameters: dict[str, Any]) -> None:
    """Print what would be handed to SLURM: the sbatch script, what it starts, and every variable set for it."""
    from submitit.slurm.slurm import _make_sbatch_string

    work, array = works[0], len(works) > 1
    write = sys.stdout.write
    if executor == "slurm":
        folder = work.folder / "submitit"
        python = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]
        count = {"map_count": len(works)} if array else {}
        write(f"# sbatch script of {parameters['job_name']}\n")
        write(_make_sbatch_string(command=shlex.join(python), folder=folder, **parameters, **count).rstrip() + "\n\n")
        for each in works:
            write(f"# which starts ({each.key})\n{shlex.join(srun_command(each, '%A_%a' if array else '%j'))}\n")
        if work.nodes > 1:
            write(f"# and beside it\n{shlex.join(heartbeat_command(work))}\n")
    else:
        where = "in the background" if executor == "local" else "here"
        write(f"# {work.tasks} process(es) on this machine, {where}\n{shlex.join(work.argv)}\n")
    write("\n# with the variables of this shell and these\n")
    for name, value in environment_shown(work, executor):
        write(f"{name}={value}\n")
    write("\n")


def environment_shown(work: Work, executor: Executor) -> Iterator[tuple[str, str]]:
    """Yield every variable a process gets, those that are known only on the machine in words."""
    yield from work.environment
    if executor == "slurm":
        yield from (("SLURM_PROCID", "<rank, from srun>"), ("SLURM_LOCALID", "<rank on its machine, from srun>"))
        yield ("SLURM_STEP_NUM_TASKS", str(work.tasks))
    elif work.tasks > 1:
        yield from (("RANK", "<rank>"), ("LOCAL_RANK", "<rank>"), ("WORLD_SIZE", str(work.tasks)))
    if work.tasks > 1:
        yield ("MASTER_ADDR", "<first machine of the job>" if executor == "slurm" else "127.0.0.1")
        yield ("MASTER_PORT", "<a port that is free on it>")


@contextlib.contextmanager
def _streams_to(path: Path) -> Iterator[None]:
    """Give child processes a file for stdout and stderr: one that outlives this command must not hold its pipes open."""
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    with path.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
