"""The one judge of how processes that work together ended: done, once more, or over. Imports no torch."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meddino.core.command import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RUN_AGAIN, EXIT_WRONG_INPUT

Decision = Literal["done", "again", "failed"]

# What a process does to itself, as signals and in slurmstepd's words. NCCL's watchdog aborts the peers of a process that
# ended with an error, so an abort beside an exit code of 1 says nothing of a cause from outside.
_CRASHES = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "Aborted", "Segmentation fault", "Bus error", "Illegal")


@dataclass(frozen=True)
class Ending:
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

    @property
    def is_crash(self) -> bool:
        """True where the process ended itself by a signal."""
        return self.exit_code is None and self.how.startswith(_CRASHES)


@dataclass(frozen=True)
class Verdict:
    """What to do now, and why.

    Attributes:
        decision: "done", "again" (run the same command again) or "failed" (a person has to look).
        exit_code: Of the whole, if it ends here.
        reason: For people.
    """

    decision: Decision
    exit_code: int
    reason: str


def read_return_code(rank: int, node: str, code: int) -> Ending | None:
    """Return the ending of a process started here; None if it ended with 0."""
    if code == EXIT_DONE:
        return None
    if code < 0:
        return Ending(str(rank), node, None, signal.Signals(-code).name)
    return Ending(str(rank), node, code, f"Exited with exit code {code}")


def judge(endings: Sequence[Ending], exit_code: int, killed_because: str | None = None) -> Verdict:
    """Decide from how the processes ended by themselves.

    One rank's death breaks the connections of the others, so the loudest cause is asked first. Wrong input never mends
    itself; who kills a process from outside (a scheduler, the kernel without memory), a lost machine or a launch that failed
    may let the next one live. A fault with a traceback, out of a GPU's memory too, comes again, whatever its peers do then.

    Args:
        endings: Processes that did not end with 0, only those that ended before anything was killed from here.
        exit_code: Of the whole.
        killed_because: Why the rest was killed from here, if it was.
    """
    story = "; ".join(str(ending) for ending in endings)
    if killed_because:
        story = f"{killed_because}; {story}" if story else killed_because
    codes = {ending.exit_code for ending in endings if ending.exit_code is not None}
    faults = codes - {EXIT_RUN_AGAIN, EXIT_WRONG_INPUT, EXIT_INTERRUPTED}
    crashed = any(ending.is_crash for ending in endings)
    killed = any(ending.exit_code is None and not ending.is_crash for ending in endings)
    fault = 1 if 1 in faults else max(faults, default=1)
    unsaid = f"ended with {exit_code} and no process said why: not launched, or its machine is gone"
    rules = (
        (EXIT_WRONG_INPUT in codes, Verdict("failed", EXIT_WRONG_INPUT, f"wrong input, see the log: {story}")),
        (EXIT_INTERRUPTED in codes, Verdict("failed", EXIT_INTERRUPTED, f"interrupted: {story}")),
        (killed, Verdict("again", EXIT_RUN_AGAIN, story)),
        (bool(faults), Verdict("failed", fault, f"a fault, its traceback is in the log: {story}")),
        (crashed or (killed_because is not None and not codes), Verdict("again", EXIT_RUN_AGAIN, story)),
        (bool(codes), Verdict("again", EXIT_RUN_AGAIN, f"stopped at a safe point: {story}")),
        (exit_code == EXIT_DONE, Verdict("done", EXIT_DONE, "done")),
    )
    return next((verdict for applies, verdict in rules if applies), Verdict("again", EXIT_RUN_AGAIN, unsaid))
