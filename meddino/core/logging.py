"""Logging to stderr through rich; stdout is left to what a command was asked to print."""

import errno
import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)


class OutputConsole(Console):
    """Tables on stdout. Where nobody reads them (`| head`) it raises as other writes do; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Let the command end as `meddino.core.command` decides."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads stdout")


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def setup_logging(verbose: bool = False, rank: int = 0) -> None:
    """Send log records to stderr, once a process.

    Args:
        verbose: Also show debug records.
        rank: Processes other than 0 show warnings and errors only, so that a line is not printed once a rank.
    """
    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("matplotlib", "PIL", "fvcore", "torch", "urllib3", "numexpr", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
