"""A polite end: a signal asks the run to stop, and all processes agree on the step after which they do."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from meddino.core.command import STOP_SIGNALS
from meddino.core.errors import StoppedEarly
from meddino.core.logging import get_logger
from meddino.distributed.launcher import launcher_pid

logger = get_logger(__name__)


class StopRequest:
    """Remembers that a signal came, or that the launcher is gone: nobody could stop this process any more."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._launcher = launcher_pid(os.environ)

    def check(self, where: str) -> None:
        """Stop all processes if any got a signal; for places between stages, where everything is saved.

        Raises:
            StoppedEarly: A signal came.
        """
        # Later: this module is loaded before anything that takes seconds, so that signals are caught from then on.
        from meddino.distributed.collectives import any_rank

        if any_rank(self.came()):
            raise StoppedEarly(f"stopped by a signal {where}, all is saved; run the same command again")

    def came(self) -> bool:
        """True if this process got a signal, whatever the others got."""
        if self.signal_name is None and self._launcher is not None and os.getppid() != self._launcher:
            logger.warning("the process that launched this one is gone; stopping as if a signal had come")
            self.signal_name = "launcher gone"
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing else here: a handler runs between any two instructions.
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the stop signals for as long as the block lasts."""
    request = StopRequest()
    # What is ignored from the start stays so: nohup wants the run to outlive its terminal.
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request._handle) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
