"""What C libraries need round their calls: silence on the console, one thread, and their errors told apart."""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import SimpleITK as sitk

_LOCK = threading.RLock()


@contextmanager
def quiet_native() -> Iterator[None]:
    """Keep lines of ITK and GDCM off the console: they quote paths and header values, and tell a user nothing."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with _LOCK:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


@contextmanager
def file_in_memory(write: Callable[[IO[bytes]], object]) -> Iterator[str]:
    """Give what is written a path that a C library can open: no folder for temporary files can be full, or slow."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory(prefix="volume-") as folder:
            with Path(folder, "file").open("wb") as stream:
                write(stream)
            yield str(Path(folder, "file"))
        return
    with open(os.memfd_create("file"), "w+b") as stream:  # noqa: PTH123 - a descriptor has no path
        write(stream)
        stream.flush()
        yield f"/proc/self/fd/{stream.fileno()}"


def use_one_thread() -> None:
    """Keep ITK from starting threads of its own, in a process that is one of many."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def raise_if_memory_ran_out(error: RuntimeError) -> None:
    """Raise MemoryError where that is what ITK's error means: it has one type for everything.

    Raises:
        MemoryError: Without a message.
    """
    if re.search(r"bad_alloc|allocate memory|out of memory", str(error), re.IGNORECASE):
        raise MemoryError from error
