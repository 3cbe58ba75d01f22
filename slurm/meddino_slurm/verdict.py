"""What the end of a step means: done, once more, or over."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meddino.core.command import EXIT_RUN_AGAIN, EXIT_WRONG_INPUT

Decision = Literal["done", "again", "failed"]

# slurmstepd's words for how a task ended, as srun repeats them.
_TASK_LINE = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,\-\[\]]+): (?P<how>.+?)\s*$")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_NODE_LINE = re.compile(r"^srun: error: Node failure on (?P<node>\S+)")


@dataclass(frozen=True)
class Outcome:
    """How one or several processes ended, when it was not with 0.

    Attributes:
        who: Ranks as a text, such as "1" or "2-3".
        node: Their machine.
        exit_code: None if a signal or the machine ended them.
        how: For people.
    """

    who: str
    node: str
    exit_code: int | None
    how: str

    def __str__(self) -> str:
        """Return one clause for a log."""
        return f"rank {self.who} on {self.node}: {self.how}"


@dataclass(frozen=True)
class Verdict:
    """What to do now, and why.

    Attributes:
        decision: "done", "again" (requeue) or "failed" (a person has to look).
        exit_code: Of the job, if it ends here.
        reason: For people.
    """

    decision: Decision
    exit_code: int
    reason: str


def read_srun_line(line: str) -> Outcome | None:
    """Return what a line on srun's stderr says about the end of a process; None if it says something else."""
    if node := _NODE_LINE.match(line):
        return Outcome("?", node["node"], None, "node failure")
    task = _TASK_LINE.match(line)
    if not task:
        return None
    code = _EXIT_CODE.search(task["how"])
    return Outcome(task["tasks"], task["node"], int(code[1]) if code else None, task["how"])


def read_return_code(rank: int, node: str, code: int) -> Outcome | None:
    """Return the outcome of a process started here; None if it ended with 0."""
    if code == 0:
        return None
    if code < 0:
        return Outcome(str(rank), node, None, signal.Signals(-code).name)
    return Outcome(str(rank), node, code, f"Exited with exit code {code}")


def judge(outcomes: Sequence[Outcome], exit_code: int, killed_because: str | None = None) -> Verdict:
    """Decide from how the processes ended by themselves.

    One rank's death breaks the connections of the others, which then fail with 1: so the loudest cause is asked first.
    Wrong input never mends itself; a signal, a lost machine or a launch that failed may.

    Args:
        outcomes: Processes that did not end with 0, only those that ended before anything was killed from here.
        exit_code: Of the whole step.
        killed_because: Why the step was killed from here, if it was.
    """
    story = "; ".join(str(outcome) for outcome in outcomes)
    if killed_because:
        story = f"{killed_because}; {story}" if story else killed_because
    codes = {outcome.exit_code for outcome in outcomes}
    numbers = [code for code in codes if code is not None]
    if EXIT_WRONG_INPUT in codes:
        return Verdict("failed", EXIT_WRONG_INPUT, f"wrong input, see the log: {story}")
    if None in codes or (killed_because and not numbers):
        return Verdict("again", EXIT_RUN_AGAIN, story)
    if set(numbers) == {EXIT_RUN_AGAIN}:
        return Verdict("again", EXIT_RUN_AGAIN, f"stopped at a safe point: {story}")
    if numbers:
        return Verdict("failed", 1 if 1 in codes else max(numbers), f"a fault, its traceback is in the log: {story}")
    if exit_code == 0:
        return Verdict("done", 0, "done")
    unsaid = f"srun ended with {exit_code} and no process said why: not launched, or its machine is gone"
    return Verdict("again", EXIT_RUN_AGAIN, unsaid)
