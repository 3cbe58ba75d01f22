"""A polite end: a signal asks the run to stop, and all processes agree on the step after which they do."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from meddino.core.logging import get_logger
from meddino.distributed.collectives import any_rank

# SIGTERM: a scheduler's time limit or pre-emption; SIGUSR1 and SIGUSR2: SLURM's --signal and submitit's warning.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
logger = get_logger(__name__)


class StopRequest:
    """Remembers that a signal came."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def agreed(self) -> bool:
        """True if any process got a signal. Every process asks at the same step, so all save together."""
        return any_rank(self.signal_name is not None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing else here: a handler runs between any two instructions.
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the stop signals for as long as the block lasts."""
    request = StopRequest()
    before = {number: signal.signal(number, request._handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
