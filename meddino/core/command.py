"""How every `meddino-*` command starts and ends: exit codes and one clear line for what the user can mend."""

import argparse
import errno
import hashlib
import io
import os
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from meddino.core.errors import MedDINOError, StoppedEarly
from meddino.core.files import is_disk_full
from meddino.core.logging import get_logger, setup_logging

_logger = get_logger(__name__)

# Folder in which processes that one launcher started note what was said, so that it is said once.
SAID_FOLDER = "MEDDINO_SAID_FOLDER"
EXIT_DONE = 0
EXIT_WRONG_INPUT = 2
EXIT_RUN_AGAIN = 75
EXIT_INTERRUPTED = 130
# SIGTERM: a scheduler's time limit, `timeout`; SIGHUP: a terminal that was closed; SIGUSR1 and SIGUSR2: SLURM's --signal and
# submitit's warning. A trainer catches them itself, and finishes its step first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def usable_cores() -> int:
    """Return how many cores this process may run on: those of its cgroup or `taskset` where the system tells, else all."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux; not macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class _Stopped(KeyboardInterrupt):
    """A signal asked the command to stop. Of this kind, as what runs between here and there lets a Ctrl-C pass."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples in a description as they are written and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        says_nothing = action.required or default is None or default is False or default in ("", [], (), argparse.SUPPRESS)
        return action.help if says_nothing or "default" in (action.help or "") else super()._get_help_string(action)


class _StoreOnce(argparse.Action):
    """Stores an option's value; a second one would replace the first without a word, so it is refused."""

    _stored_in: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings and self._stored_in is namespace:
            parser.error(f"{option_string} is given twice, {getattr(namespace, self.dest)} and {values}; it is allowed once")
        self._stored_in = namespace
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Its subcommands' parsers are of this class as well."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **given})
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)


def command_parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser whose --help ends with an example that works.

    Args:
        program: Name of the command, e.g. "meddino-curate".
        description: One sentence.
        example: One or more lines as a user would type them.
    """
    parser = _Parser(prog=program, description=description, epilog=f"example:\n  {example}")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print debug records")
    return parser


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, handle: Callable[[argparse.Namespace], int | None]
) -> int:
    """Parse the arguments, run the command, and turn what went wrong into an exit code.

    Args:
        parser: From `command_parser`.
        argv: Arguments; the process's own if None.
        handle: The work. It raises; it never calls `sys.exit`. What started other processes returns their exit code.

    Returns:
        0 done, 2 wrong input or a file that the system does not let be read or written (one line on stderr), 75 stopped
        early (by one of `STOP_SIGNALS` too) and wants to be run again. Other faults raise, which shows their traceback and
        exits 1.
    """
    _open_closed_streams()
    arguments = _parse(parser, argv)
    # What libraries say to their own developers is nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"monai|torch|timm|transformers")
    setup_logging(arguments.verbose, rank=int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    try:
        with _stopped_by_signals():
            code = handle(arguments) or EXIT_DONE
        sys.stdout.flush()  # here, where a reader that is gone can be told from a fault
        return code
    except MedDINOError as error:
        _say_once(f"{parser.prog}: error: {error}")
        return EXIT_WRONG_INPUT
    except (StoppedEarly, _Stopped) as stop:
        _say_once(f"{parser.prog}: {stop}")
        return EXIT_RUN_AGAIN
    except KeyboardInterrupt:
        _say_once(f"{parser.prog}: interrupted; the same command again goes on")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return EXIT_DONE
    except OSError as error:
        if is_disk_full(error):
            where = f" while writing {error.filename}" if error.filename else ""
            problem = f"no space left on the disk{where}; free some, then run the same command again"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            problem = f"too many open files, {limit} are allowed; allow more (ulimit -n 65536), then run the same command again"
        elif (name := error.filename2 or error.filename) and error.strerror:  # of two, the one that was to be written
            problem = f"{os.fsdecode(name)}: {error.strerror[0].lower()}{error.strerror[1:]}"
            _logger.debug("where it happened", exc_info=error)
        else:
            raise
        _say_once(f"{parser.prog}: error: {problem}")
        return EXIT_WRONG_INPUT


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let a signal that ends programs unwind this one, so that it takes away what is half-written and says how it ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers belong to the main thread
        return
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a fork: a worker of somebody else's, which ends as any program
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise _Stopped(f"stopped by {signal.Signals(number).name}; the same command again goes on")

    # What is ignored from the start stays so: nohup wants the command to outlive its terminal.
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_closed_streams() -> None:
    """Give a command that was started with closed streams (`2>&-`) /dev/null: its next file would get their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be bytes that no text holds, as on stderr


def _reader_has_gone() -> bool:
    """Tell whether stdout is a pipe that nobody reads any more (`| head`), and write nothing more into it if so."""
    asked = select.poll()
    asked.register(sys.stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    # Python would tell of it once more as it flushes at the very end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _say_once(line: str) -> None:
    """Print a line on stderr, but not where another process of the same launcher has said the same."""
    folder = os.environ.get(SAID_FOLDER)
    if folder is not None:
        with suppress(FileNotFoundError):  # the launcher has gone; then better twice than never
            try:
                (Path(folder) / hashlib.sha256(line.encode("utf-8", "surrogateescape")).hexdigest()).touch(exist_ok=False)
            except FileExistsError:
                return
    with suppress(OSError):  # no room even for that (a log on a full disk): the exit code still says it
        print(line, file=sys.stderr, flush=True)


def write_line(text: str, end: str = "\n") -> None:
    """Print a line of a result that the user asked for, at once; messages go through the log."""
    print(text, end=end, flush=True)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; `key=value` may stand anywhere, which argparse does not see after an option."""
    for word in sys.argv[1:] if argv is None else argv:
        if any("\udc80" <= sign <= "\udcff" for sign in word):
            # Bytes that no text holds: they cannot stand in a config, a manifest or a report, so nothing is begun with them.
            parser.error(
                f"{ascii(word)[1:-1]}: a name that is no UTF-8 (Latin-1?); rename it, as with convmv -f latin1 -t utf8"
            )
    arguments, left = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    strange = [text for text in left if not takes_overrides or text.startswith("-") or "=" not in text]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments
