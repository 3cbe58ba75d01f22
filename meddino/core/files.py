"""Files that are either whole or absent: written beside, fsynced, renamed."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from meddino.core.errors import MedDINOError

PARTIAL_SUFFIX = ".partial"
_LEFTOVER = re.compile(r".+\.\d+" + re.escape(PARTIAL_SUFFIX))
_FULL_BELOW_BYTES = 256 << 10
_TROUBLE_OF_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
    errno.EAGAIN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, so that equal values give equal bytes. NaN is refused: it is no JSON."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def fsync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an error.

    Args:
        path: Final name; its folder is made. What stood there is replaced in one step.
        mode: "wb" or "w" (UTF-8).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open(mode, encoding=None if mode == "wb" else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_write(path, "w") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write an indented, key-sorted JSON file atomically. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when the block ends without an error.

    Yields:
        The folder to write into. Everything in it is fsynced before it is renamed to `path`. An existing `path` is
        moved aside first and deleted last, so there is a moment without it but never one with half of it. What a process
        left that was killed in the midst of this goes first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _take_up(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: what is left there stays
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            else:
                fsync_directory(file)
        fsync_directory(partial)
        old = path.with_name(f"{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        partial.rename(path)
        fsync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _take_up(path)
        raise
    finally:
        os.close(held)


def _take_up(path: Path) -> None:
    """Put a folder back that a killed process had moved aside, and remove what killed ones were writing."""
    own = re.compile(re.escape(path.name) + r"\.\d+(\.old|" + re.escape(PARTIAL_SUFFIX) + ")")
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name) and entry.is_dir()]:
        if left.suffix != PARTIAL_SUFFIX and not path.exists():
            left.rename(path)
        elif left.suffix != PARTIAL_SUFFIX or _is_nobodys(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_nobodys(partial: Path) -> bool:
    """Tell whether no process writes into a folder any more: the lock on it ends with its writer."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def sizes_below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield every file in a folder, however deep, and its length in bytes, while others may be writing there.

    What vanishes while it is looked at, a file or a whole folder, is left out; so is a folder that does not exist.
    """
    for parent, _, names in os.walk(folder):  # unlike rglob it goes on where a folder has been removed
        for name in names:
            path = Path(parent, name)
            with suppress(FileNotFoundError):
                yield path, path.stat().st_size


def remove_leftovers(folder: Path) -> None:
    """Remove files that killed processes left half-written anywhere in a folder; nobody else may be writing there."""
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def remove_leftovers_of(file: Path) -> None:
    """Remove what killed processes left half-written of one file, in a folder that may be anybody's."""
    for path in file.parent.glob(f"{glob.escape(file.name)}.*{PARTIAL_SUFFIX}"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder for as long as the block lasts.

    The folder is made if it is not there, and gone again if nothing came of it: a wrong command leaves no empty folder. The
    lock is on the folder itself and leaves no file; it ends with the process, however that ends. Where the file system knows
    no locks, nothing is locked.

    Raises:
        MedDINOError: Another command has it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MedDINOError(f"another command is writing into {folder}; wait for it or choose another --out") from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it holds something
                    folder.rmdir()
    finally:
        os.close(descriptor)


def check_free_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Refuse early where a write cannot fit.

    Args:
        directory: Where it will be written; the nearest existing parent is asked.
        needed_bytes: Size of what will be written.
        what: Named in the message, e.g. "a checkpoint".

    Raises:
        MedDINOError: If less is free.
    """
    existing = next(folder for folder in [directory.absolute(), *directory.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise MedDINOError(
            f"no room for {what} in {directory}: {needed_bytes / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; "
            "free some space or choose another folder, then run the same command again"
        )


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def cause_without_path(error: OSError) -> str:
    """Return what the system says was wrong with a file; its whole message would name the file.

    Raises:
        OSError: The same one, where the system is in trouble and not the file: a disk that fills up or fails, a network that
            is gone, no descriptors left. That must be mended or tried again, never remembered as bad data.
    """
    if error.errno in _TROUBLE_OF_THE_SYSTEM:
        raise error
    return (error.strerror or "input/output error").lower()


def told_by_system(error: Exception, path: Path) -> Exception:
    """Return the error of a full disk where a library has hidden it in one of its own, else that error.

    Args:
        error: What the library raised while it wrote a file.
        path: The file.
    """
    full = f"os error {errno.ENOSPC}" in str(error) or shutil.disk_usage(path.parent).free < _FULL_BELOW_BYTES
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) if full else error
