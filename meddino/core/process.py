"""Processes and those that started them."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Let the kernel end this process as soon as the one that started it is gone, whatever ended that one.

    SIGKILL leaves a trainer no time to end its workers, and a worker that waits for a full queue or for a disk does not look
    whether anybody still reads. Linux only; elsewhere this does nothing.

    Args:
        parent: The process id of the one that started this process. It may be gone already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
