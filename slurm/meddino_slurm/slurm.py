"""SLURM's own commands: asking, requeueing, cancelling. Works with and without accounting."""

import difflib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger

log = get_logger(__name__)

# While a job is in one of these SLURM may still run it.
ACTIVE = frozenset(
    {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "STAGE_OUT", "SIGNALING"}
)
COMMAND_TIMEOUT_S = 60


def ask(command: Sequence[str]) -> str | None:
    """Return what a SLURM command prints, or None if it is not there, fails or does not answer in a minute."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", command[0], error)
        return None
    if run.returncode:
        log.debug("%s: %s", " ".join(command), run.stderr.strip())
        return None
    return run.stdout


def check_slurm() -> None:
    """Refuse early where nothing can be submitted.

    Raises:
        MedDINOError: There is no SLURM on this machine, or it does not answer.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise MedDINOError(
            "there is no SLURM on this machine (no sbatch in PATH); run this on a login node of the cluster, or here with "
            "--executor local (in the background) or --executor debug (in the foreground)"
        )
    try:
        run = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        why = _first_line(run.stderr) if run.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"sinfo said nothing for {COMMAND_TIMEOUT_S} s"
    if why:
        raise MedDINOError(f"SLURM does not answer: {why}; try again, or use --executor local")


def check_partition(name: str | None) -> None:
    """Refuse a partition that SLURM does not know.

    Raises:
        MedDINOError: Names the known ones.
    """
    known = sorted(set((ask(["sinfo", "-h", "-a", "-o", "%R"]) or "").split()))
    if name is None or not known or all(part in known for part in name.split(",")):
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise MedDINOError(f"SLURM has no partition '{name}'; {hint}known: {', '.join(known)}")


def job_states(job_ids: Iterable[str]) -> dict[str, str]:
    """Return the state of each job SLURM still knows, such as PENDING, RUNNING, COMPLETED, CANCELLED or NODE_FAIL.

    squeue is asked first: it is right about what is waiting or running, with or without accounting. What is not there any
    more is asked from sacct, and where a site has none, from scontrol, which remembers a job for some minutes.

    Args:
        job_ids: "17", or "17_3" for the element of an array.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    states = _squeue_states(wanted)
    for source in (_sacct_states, _scontrol_states):
        missing = [job for job in wanted if job not in states]
        if missing:
            states.update({job: state for job, state in source(missing).items() if job not in states})
    return states


def is_active(job_id: str) -> bool:
    """True if SLURM may still run the job."""
    return job_states([job_id]).get(job_id) in ACTIVE


def pending_reason(job_id: str) -> str:
    """Return why a job waits, such as Resources, Priority or Dependency; empty if it does not."""
    answer = ask(["squeue", "-h", "-j", job_id, "-t", "PENDING", "-o", "%r"])
    return (answer or "").split("\n")[0].strip()


def end_time_s(job_id: str) -> float | None:
    """Return when the time limit ends the job, in seconds since 1970; None if it has none or SLURM does not say."""
    answer = ask(["squeue", "-h", "-j", job_id, "-o", "%L"]) or ""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", answer.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return time.time() + days * 86400 + hours * 3600 + minutes * 60 + seconds


def requeue(job_id: str) -> str | None:
    """Put a running job back into the queue under its own id; returns why not, or None."""
    run = subprocess.run(
        ["scontrol", "requeue", job_id], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    return _first_line(run.stderr) if run.returncode else None


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs.

    Raises:
        MedDINOError: SLURM refuses.
    """
    run = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if run.returncode:
        raise MedDINOError(f"scancel {' '.join(job_ids)}: {_first_line(run.stderr)}")


def own_job_id(environment: Mapping[str, str]) -> str | None:
    """Return the id of the job this process belongs to, "17" or "17_3"; None outside of SLURM."""
    if "SLURM_JOB_ID" not in environment:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def host_names(node_list: str) -> list[str]:
    """Return the machines of a node list such as `gpu[003-005]`, as SLURM reads it."""
    answer = ask(["scontrol", "show", "hostnames", node_list])
    return answer.split() if answer else [node_list]


def without_slurm_tasks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what describes the batch step: srun sets its own for each task."""
    own = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_", "SLURM_GTIDS", "SLURM_TASK_PID", "SUBMITIT_")
    return {name: value for name, value in environment.items() if not name.startswith(own)}


def user_name() -> str:
    """Return who runs this process, for the note in a lock."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())


def _squeue_states(wanted: Sequence[str]) -> dict[str, str]:
    # One job id that squeue has forgotten makes it fail for all, so the user's whole queue is asked.
    answer = ask(["squeue", "-h", "-a", "-r", "--me", "-o", "%i %T"])
    found = dict(line.split(maxsplit=1) for line in (answer or "").splitlines() if " " in line)
    states = {}
    for job in wanted:
        elements = [state for name, state in found.items() if name == job or name.startswith(f"{job}_")]
        if elements:
            states[job] = "RUNNING" if "RUNNING" in elements else elements[0]
    return states


def _sacct_states(wanted: Sequence[str]) -> dict[str, str]:
    answer = ask(["sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(wanted)])
    states: dict[str, list[str]] = {}
    for line in (answer or "").splitlines():
        name, _, state = line.partition("|")
        # "CANCELLED by 1000"
        word = state.split()[0] if state else ""
        for job in {name, name.split("_")[0]} & set(wanted):
            states.setdefault(job, []).append(word)
    return {job: _worst(found) for job, found in states.items()}


def _scontrol_states(wanted: Sequence[str]) -> dict[str, str]:
    states = {}
    for job in wanted:
        answer = ask(["scontrol", "show", "job", job, "-o"]) or ""
        found = re.findall(r"\bJobState=(\S+)", answer)
        if found:
            states[job] = _worst(found)
    return states


def _worst(states: Sequence[str]) -> str:
    """Return the state of an array from those of its elements: active before failed before completed."""
    return min(states, key=lambda state: (state not in ACTIVE, state == "COMPLETED"))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
