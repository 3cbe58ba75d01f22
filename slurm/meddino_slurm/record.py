"""What is written down about jobs: what was submitted, every attempt, who holds a run folder."""

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import meddino
from meddino.core.errors import MedDINOError
from meddino.core.files import sizes_below, write_json
from meddino.core.logging import get_logger
from meddino_slurm import slurm
from meddino_slurm.work import LINKED, Work, job_folder

log = get_logger(__name__)

Json = dict[str, Any]
FORMAT = 1


def now_text() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> Json:
    """Return which MedDINO this is: package version and, from a checkout, the commit."""
    source = Path(meddino.__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=False
        )
        commit = run.stdout.strip() or None
    except (FileNotFoundError, subprocess.TimeoutExpired):
        commit = None
    return {"meddino": importlib.metadata.version("meddino"), "git_commit": commit}


def read_json(path: Path, otherwise: Json) -> Json:
    """Return a JSON object, or `otherwise` if the file is not there.

    Raises:
        MedDINOError: It is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return otherwise
    except json.JSONDecodeError as error:
        raise MedDINOError(f"{path} is no JSON: {error}; move it away if it is damaged") from error
    if not isinstance(value, dict):
        raise MedDINOError(f"{path} holds no JSON object")
    return value


# Submissions


def submissions(out: Path) -> list[Json]:
    """Return what was submitted for a run folder, oldest first."""
    jobs: list[Json] = read_json(job_folder(out) / "jobs.json", {"jobs": []})["jobs"]
    return jobs


def add_submission(out: Path, entry: Json) -> None:
    """Note one submission."""
    write_json(job_folder(out) / "jobs.json", {"format": FORMAT, "jobs": [*submissions(out), entry]})


def mark_cancelled(out: Path, job_ids: set[str]) -> None:
    """Note that a person cancelled jobs: without accounting SLURM forgets it within minutes."""
    jobs = [{**job, "cancelled": now_text()} if job["id"] in job_ids else job for job in submissions(out)]
    write_json(job_folder(out) / "jobs.json", {"format": FORMAT, "jobs": jobs})


# Attempts


class Record:
    """Every attempt of one piece of work, in `<out>.slurm/record-<key>.json`; written by one supervisor at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._path = record_path(work.out, work.key)
        stored = read_json(self._path, {"attempts": []})
        self.attempts: list[Json] = stored["attempts"]

    def start(self, job_id: str, nodes: list[str], progress: str) -> None:
        """Note that an attempt starts. One before it that never ended was lost with its machine."""
        for attempt in self.attempts:
            if attempt["ended"] is None:
                attempt |= {
                    "ended": now_text(),
                    "decision": "again",
                    "reason": "lost: its supervisor never came back (a machine failed?)",
                }
        self.attempts.append(
            {
                "job_id": job_id,
                "nodes": nodes,
                "started": now_text(),
                "ended": None,
                "progress_at_start": progress,
                "restart": sum(attempt["job_id"] == job_id for attempt in self.attempts),
                "decision": "running",
                "exit_code": None,
                "reason": "",
                **versions(),
            }
        )
        self._write()

    def end(self, decision: str, exit_code: int, reason: str) -> None:
        """Note how the last attempt ended."""
        self.attempts[-1] |= {"ended": now_text(), "decision": decision, "exit_code": exit_code, "reason": reason}
        self._write()

    def without_progress(self, job_id: str, progress: str) -> int:
        """Return how many attempts of a job in a row, the last ones, started from where the run stands now."""
        count = 0
        for attempt in reversed(self.attempts):
            if attempt["job_id"] != job_id or attempt["progress_at_start"] != progress:
                break
            count += 1
        return count

    def _write(self) -> None:
        write_json(
            self._path,
            {
                "format": FORMAT,
                "command": list(self._work.argv),
                "arguments": list(self._work.arguments),
                "key": self._work.key,
                "attempts": self.attempts,
            },
        )


def record_path(out: Path, key: str) -> Path:
    """Return the file of a record."""
    return job_folder(out) / f"record-{key}.json"


def all_attempts(out: Path) -> list[Json]:
    """Return the attempts of all work on a run folder, each with its key, in the order they started."""
    found = [
        {**attempt, "key": key}
        for path in sorted(job_folder(out).glob("record-*.json"))
        for key in [path.stem.removeprefix("record-")]
        for attempt in read_json(path, {"attempts": []})["attempts"]
    ]
    return sorted(found, key=lambda attempt: attempt["started"])


def progress(out: Path, command: str) -> str:
    """Return a text that changes whenever a command has got further for good.

    For pretraining that is the highest checkpoint of every stage and nothing else: a run that only ever writes metrics and
    then dies gets nowhere. For other commands it is how much has been written.
    """
    if command == "pretrain":
        steps: dict[str, int] = {}
        for folder in out.glob("*/checkpoints/step-*"):
            if match := re.fullmatch(r"step-(\d+)", folder.name):
                stage = folder.parents[1].name
                steps[stage] = max(steps.get(stage, -1), int(match[1]))
        return ", ".join(f"{stage} at step {step}" for stage, step in sorted(steps.items())) or "no checkpoint yet"
    sizes = [
        size
        for path, size in sizes_below(out)
        if path.name != "run.json" and not path.name.endswith((".partial", ".log"))  # run.json is partly ours
    ]
    return f"{len(sizes)} files, {sum(sizes)} bytes" if sizes else "nothing written yet"


def note_in_run(work: Work) -> None:
    """Add the attempts to run.json and link the logs, where the command has made its folder.

    Only ever called while no process of the job runs: the command itself owns run.json then.
    """
    if work.command not in LINKED or not work.out.is_dir() or not any(work.out.iterdir()):
        return  # a command may refuse a new folder that holds something already
    link = work.out / "slurm"
    if not link.is_symlink() and not link.exists():
        link.symlink_to(Path("..") / work.folder.name)
    run = work.out / "run.json"
    if run.is_file():
        write_json(run, {**read_json(run, {}), "jobs": all_attempts(work.out)})


# Locks


class Lock:
    """One job at a time on a piece of work. The file says who holds it."""

    def __init__(self, work: Work, job_id: str, executor: str) -> None:
        self._path = work.folder / f"lock-{work.key}.json"
        self._mine = {
            "job_id": job_id,
            "executor": executor,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "user": slurm.user_name(),
            "since": now_text(),
        }

    def take(self) -> None:
        """Take the lock, also over from a holder that is gone or from this job's earlier attempt.

        Raises:
            MedDINOError: Another job holds it; says which.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(10):
            try:
                with self._path.open("x") as stream:
                    json.dump(self._mine, stream)
                    return
            except FileExistsError:
                self._clear_if_gone()
        raise MedDINOError(f"{self._path} could not be taken; other jobs are fighting for it")

    def release(self) -> None:
        """Give the lock up, if it is still ours."""
        if read_json(self._path, {}).get("job_id") == self._mine["job_id"]:
            self._path.unlink(missing_ok=True)

    def _clear_if_gone(self) -> None:
        try:
            holder = read_json(self._path, {})
        except MedDINOError:
            time.sleep(0.2)  # being written this moment, or torn by a crash
            holder = read_json(self._path, {})
        if not holder:
            return
        same = holder["job_id"] == self._mine["job_id"] and holder["executor"] == self._mine["executor"]
        if not same and holder_is_alive(holder):
            raise MedDINOError(f"{held_text(self._path, holder)}; wait for it or cancel it")
        if not same:
            log.warning("taking over the lock of job %s, which is gone", holder["job_id"])
        self._path.unlink(missing_ok=True)


def held_text(path: Path, holder: Mapping[str, Any]) -> str:
    """Return who holds a lock, as a sentence."""
    kind = "SLURM job" if holder["executor"] == "slurm" else f"{holder['executor']} process"
    return (
        f"{path.parent.name.removesuffix('.slurm')} is held by {kind} {holder['job_id']} of {holder['user']} on "
        f"{holder['host']} since {holder['since']} ({path})"
    )


def holder_is_alive(holder: Mapping[str, Any]) -> bool:
    """True if the job or process that wrote a lock may still be at work."""
    if holder["executor"] == "slurm":
        return slurm.is_active(holder["job_id"])
    if holder["host"] != socket.gethostname():
        return True  # cannot be known from here; the message names the file
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
