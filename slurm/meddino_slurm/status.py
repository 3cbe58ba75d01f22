"""`meddino-submit status|logs|cancel FOLDER`: what became of the jobs of a run folder."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.command import command_parser, write_line
from meddino.core.errors import MedDINOError
from meddino_slurm import slurm
from meddino_slurm.record import Json, all_attempts, mark_cancelled, progress, submissions
from meddino_slurm.work import job_folder

ASKING = {
    "status": "Show what became of each job of a run folder.",
    "logs": "Show the newest log of a run folder.",
    "cancel": "Cancel the jobs of a run folder.",
}
FOLLOW_POLL_S = 1.0
LOOK_S = 3.0  # SLURM is not asked at every glance at a file
# What the supervisor's last word means once SLURM no longer tells.
STATE_OF_DECISION = {"done": "COMPLETED", "failed": "FAILED", "again": "LOST", "running": "LOST"}


@dataclass(frozen=True)
class Row:
    """One job, or one element of an array, in `status`.

    Attributes:
        job_id: As SLURM or submitit names it.
        name: What it does.
        state: SLURM's word, or ours where SLURM has forgotten it.
        restarts: How often it has been started again.
        nodes: Where its last attempt ran.
        note: Why it waits, failed or gave up.
    """

    job_id: str
    name: str
    state: str
    restarts: int
    nodes: str
    note: str


def ask_command(command: str, arguments: Sequence[str]) -> None:
    """Answer `status`, `logs` or `cancel`."""
    asked = command_parser(f"meddino-submit {command}", ASKING[command], f"meddino-submit {command} run")
    asked.add_argument("folder", type=Path, help="the --out of the job")
    if command == "logs":
        asked.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
        asked.add_argument("--rank", default="0", help="number of a process, or supervisor")
        asked.add_argument("--job", help="of this job only")
    found = asked.parse_args(arguments)
    out = found.folder.absolute()
    if command == "status":
        write_line(table(out))
    elif command == "cancel":
        write_line(f"cancelled {', '.join(cancel(out))}")
    else:
        show_log(out, found.rank, found.job, found.follow)


def rows(out: Path) -> list[Row]:
    """Return the jobs of a run folder, oldest first.

    Raises:
        MedDINOError: Nothing was submitted for it.
    """
    jobs = _jobs(out)
    attempts = all_attempts(out)
    elements = [(job, job_id, key) for job in jobs for job_id, key in _elements(job)]
    slurm_ids = [job_id for job, job_id, _ in elements if job["executor"] == "slurm"]
    states = slurm.job_states(slurm_ids)
    return [_row(job, job_id, key, states.get(job_id), attempts) for job, job_id, key in elements]


def summary(out: Path) -> str:
    """Return one line: how far the run folder is."""
    return f"{out}: {progress(out, _jobs(out)[-1]['kind'])}; logs in {job_folder(out)}"


def table(out: Path) -> str:
    """Return `status` as text: a line for each job, then one for the run folder."""
    header = Row("JOB", "NAME", "STATE", 0, "NODES", "NOTE")
    lines = [header, *rows(out)]
    cells = [[r.job_id, r.name, r.state, "RESTARTS" if r is header else str(r.restarts), r.nodes or "-", r.note] for r in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5]]).rstrip()
        for line in cells
    ]
    return "\n".join([*text, summary(out)])


def log_file(out: Path, rank: str = "0", job_id: str | None = None) -> Path:
    """Return the newest log of a run folder.

    Args:
        out: The run folder.
        rank: A process's number, or "supervisor".
        job_id: Of this job only.

    Raises:
        MedDINOError: There is none yet.
    """
    _jobs(out)
    name = "*.supervisor.log" if rank == "supervisor" else f"*.rank-{rank}.log"
    found = [path for path in job_folder(out).glob(name) if job_id is None or path.name.split(".")[0] == job_id]
    if not found:
        waiting = ", ".join(f"{row.job_id} {row.state}" for row in rows(out))
        raise MedDINOError(f"no log of rank {rank} in {job_folder(out)} yet; jobs: {waiting}")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def show_log(out: Path, rank: str, job_id: str | None, following: bool) -> None:
    """Print a log, and with `following` go on until no job of the run folder is active.

    Raises:
        MedDINOError: There is no log (yet; one that is followed is waited for while a job may still write it).
    """
    while following and any(row.state in slurm.ACTIVE for row in rows(out)):
        with suppress(MedDINOError):
            log_file(out, rank, job_id)
            break
        time.sleep(FOLLOW_POLL_S)
    path = log_file(out, rank, job_id)
    for text in follow(path, out) if following else [path.read_text(errors="replace")]:
        write_line(text, end="")


def follow(path: Path, out: Path) -> Iterator[str]:
    """Yield what a log holds and then what is added, until no job of the run folder is active."""
    with path.open(errors="replace") as stream:
        looked_at = 0.0
        while True:
            if text := stream.read():
                yield text
                continue
            if time.monotonic() - looked_at > LOOK_S:
                if not any(row.state in slurm.ACTIVE for row in rows(out)):
                    if text := stream.read():
                        yield text
                    return
                looked_at = time.monotonic()
            time.sleep(FOLLOW_POLL_S)


def cancel(out: Path) -> list[str]:
    """Cancel every active job of a run folder; returns their ids.

    Raises:
        MedDINOError: None is active, or SLURM refuses.
    """
    active = [row.job_id for row in rows(out) if row.state in slurm.ACTIVE]
    if not active:
        raise MedDINOError(f"{out}: no job waits or runs")
    jobs = {job["id"]: job for job in _jobs(out)}
    whole = {job_id.split("_")[0] for job_id in active}
    mark_cancelled(out, whole)
    local = {job_id for job_id in whole if jobs[job_id]["executor"] != "slurm"}
    if whole - local:
        slurm.cancel(sorted(whole - local))
    for job_id in local:
        os.kill(int(job_id), signal.SIGTERM)
    return sorted(whole)


def job_ids_to_wait_for(what: str) -> list[str]:
    """Return the jobs that `--after` means: a job id, or the last submission of a run folder.

    Raises:
        MedDINOError: Nothing was submitted for the folder.
    """
    if what.isdigit():
        return [what]
    return [_jobs(Path(what))[-1]["id"]]


def _jobs(out: Path) -> list[Json]:
    jobs = submissions(out)
    if not jobs:
        raise MedDINOError(f"no job was ever submitted for {out} (there is no {job_folder(out) / 'jobs.json'})")
    return jobs


def _elements(job: Json) -> list[tuple[str, str]]:
    keys = job["keys"]
    return [(job["id"], keys[0])] if len(keys) == 1 else [(f"{job['id']}_{number}", key) for number, key in enumerate(keys)]


def _row(job: Json, job_id: str, key: str, state: str | None, attempts: list[Json]) -> Row:
    own = [attempt for attempt in attempts if attempt["job_id"] == job_id]
    last: dict[str, Any] = own[-1] if own else {"nodes": [], "reason": "", "decision": None, "restart": 0}
    if state is None and job["executor"] != "slurm":
        state = "RUNNING" if _local_is_alive(job_id) else None
    if state is None:
        # SLURM keeps no trace of an element of an array that was cancelled while it waited.
        never_started = not own and len(job["keys"]) > 1
        state = "CANCELLED" if job.get("cancelled") or never_started else STATE_OF_DECISION.get(last["decision"], "LOST")
    note = last["reason"]
    if state == "PENDING":
        why = slurm.pending_reason(job_id)
        note = f"waits: {why}" + (f"; before: {last['reason']}" if last["reason"] else "")
    elif state == "LOST":
        note = "neither waits nor runs, and never said that it ended; submit the same line again to go on"
    name = job["name"] if len(job["keys"]) == 1 else key
    return Row(job_id, name, state, last["restart"], ",".join(last["nodes"]), note)


def _local_is_alive(job_id: str) -> bool:
    try:
        return b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
