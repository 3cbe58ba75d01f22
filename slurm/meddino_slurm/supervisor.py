"""Runs one job from inside: starts its processes, waits, and decides whether SLURM should run it again.

One supervisor a job, on the first machine, outside of the processes' own step. So it outlives any of them, sees how each
ended, and the processes themselves are exactly the command a user would type: the training loop sees SLURM's signals and
saves; submitit's own handlers, which save from one rank only, are replaced.
"""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Literal

from meddino.core.command import EXIT_RUN_AGAIN, EXIT_WRONG_INPUT
from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger, setup_logging
from meddino.distributed.exit_codes import Verdict, judge
from meddino.distributed.launcher import Signals, Step, watch
from meddino_slurm import slurm
from meddino_slurm.record import Lock, Record, note_in_run, progress
from meddino_slurm.steps import Heartbeats, SrunStep, base_environment, local_step, rendezvous
from meddino_slurm.work import Work

log = get_logger(__name__)

Executor = Literal["slurm", "local", "debug"]
POLL_S = 0.5
# After one process has died the others get this long to notice and to end with an exit code of their own.
OTHERS_GRACE_S = 20
# A job that has not stopped this shortly before its time limit is requeued while SLURM still lets us.
END_MARGIN_S = 4


class JobSupervisor:
    """The function submitit runs. Ends by SystemExit with the exit code of the job."""

    def __init__(self, work: Work, executor: Executor) -> None:
        self.work = work
        self.executor = executor

    def __call__(self) -> None:
        """Run the job to its end, or to its next place in the queue."""
        job_id = self._job_id()
        if self.executor == "local":
            _write_to(self.work.folder / f"{job_id}.supervisor.log")
        setup_logging()
        lock = Lock(self.work, job_id, self.executor)
        try:
            lock.take()
            record = Record(self.work)
        except MedDINOError as error:
            log.error("%s", error)
            raise SystemExit(EXIT_WRONG_INPUT) from error
        signal.signal(signal.SIGCONT, signal.SIG_IGN)  # precedes SIGTERM and means nothing
        signals = Signals()
        signals.install()
        while True:
            verdict = self._attempt(job_id, record, signals)
            if verdict.decision == "again" and self.executor == "slurm":
                if requeue(job_id, verdict):
                    raise SystemExit(EXIT_RUN_AGAIN)  # the lock stays with this job id
                break
            if verdict.decision != "again" or signals.seen:
                break
            log.info("starting again")
        lock.release()
        raise SystemExit(verdict.exit_code)

    def _job_id(self) -> str:
        if self.executor == "slurm":
            return slurm.own_job_id(os.environ) or "none"
        # The id submitit gave it, which `status` and `cancel` know.
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))

    def _attempt(self, job_id: str, record: Record, signals: Signals) -> Verdict:
        work = self.work
        # A requeue by SLURM itself, after a machine failed, comes through here and nowhere else.
        before = progress(work.out, work.command)
        tried = record.without_progress(job_id, before)
        if tried >= work.attempts_without_progress:
            verdict = _given_up(tried, before)
            record.end(verdict.decision, verdict.exit_code, verdict.reason)
            return verdict
        nodes = slurm.host_names(os.environ["SLURM_JOB_NODELIST"]) if self.executor == "slurm" else [socket.gethostname()]
        record.start(job_id, nodes, before)
        note_in_run(work)
        log.info("%s: attempt %d on %s, %s", work.key, tried + 1, ", ".join(nodes), before)
        verdict = self._run(job_id, nodes[0], signals)
        after = progress(work.out, work.command)
        tried = record.without_progress(job_id, after)
        if verdict.decision == "again" and tried >= work.attempts_without_progress:
            given_up = _given_up(tried, after)
            verdict = Verdict("failed", given_up.exit_code, f"{given_up.reason}; last: {verdict.reason}")
        if verdict.decision == "again" and signals.stop and not self._may_go_on(job_id):
            verdict = Verdict("failed", EXIT_RUN_AGAIN, f"asked to end; the same command again goes on ({verdict.reason})")
        record.end(verdict.decision, verdict.exit_code, verdict.reason)
        note_in_run(work)
        log.info("%s: %s, %s", work.key, verdict.reason, after)
        return verdict

    def _may_go_on(self, job_id: str) -> bool:
        """Tell a pre-emption without a signal of its own, whose job still runs, from a cancelled or ended job."""
        return self.executor == "slurm" and slurm.job_states([job_id]).get(job_id) == "RUNNING"

    def _run(self, job_id: str, first_host: str, signals: Signals) -> Verdict:
        work = self.work
        environment = {**base_environment(), **dict(work.environment)}
        if work.tasks > 1:
            environment |= rendezvous(first_host if self.executor == "slurm" else "127.0.0.1")
        step: Step
        if self.executor == "slurm":
            step = SrunStep(work, job_id, environment)
            beats, end_s = Heartbeats(work), slurm.end_time_s(job_id)
        else:
            step = local_step(work, job_id, environment, foreground=self.executor == "debug")
            beats, end_s = None, None
        try:
            endings, because = watch(step, signals, OTHERS_GRACE_S, lambda: _reason_to_end(beats, end_s), POLL_S)
        finally:
            if beats:
                beats.stop()
        return judge(endings, step.exit_code() or 0, because)


def _reason_to_end(beats: Heartbeats | None, end_s: float | None) -> str | None:
    """Return why a job cannot end well any more: a machine that went silent, or its time limit [s since 1970] is here."""
    if beats and (node := beats.silent_node()):
        return f"{node} has gone silent"
    return "still running at its time limit" if end_s is not None and time.time() > end_s - END_MARGIN_S else None


def _write_to(path: Path) -> None:
    """Send what this process says to a file; under SLURM the sbatch script does it."""
    with path.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def requeue(job_id: str, verdict: Verdict) -> bool:
    """Requeue this job; False if SLURM refuses, and then the job ends here."""
    refused = slurm.requeue(job_id)
    if refused:
        log.error("SLURM does not requeue job %s: %s; the same meddino-submit line goes on from here", job_id, refused)
        return False
    log.info("requeued: %s", verdict.reason)
    return True


def _given_up(tried: int, progress_text: str) -> Verdict:
    return Verdict("failed", EXIT_RUN_AGAIN, f"gave up after {tried} attempts without progress ({progress_text})")
