"""Files inside zip and tar archives, read where they lie: a path goes on behind its archive as if that were a folder.

Nothing is unpacked into a folder, so that no name in an archive leads anywhere. What an archive claims is checked against
what it can hold before memory is taken.
"""

import gzip
import io
import os
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from meddino.core.errors import VolumeError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_PACKED_SUFFIXES = (".tar.gz", ".tgz")
_MOST_MEMBERS = 200_000
_MOST_MEMBER_BYTES = 4 << 30
_MOST_UNPACKED_BYTES = 8 << 30  # of a packed tar, which cannot be read from its middle
_HELD_IN_MEMORY_BYTES = 256 << 20  # of it; the rest lies in a temporary file without a name
_MOST_INDEX_BYTES = 32 << 20  # of a zip: 200,000 members with long names
_MOST_AT_ONCE_BYTES = 1 << 20
_MOST_PER_BYTE = 1032  # deflate's best
_OPEN_ARCHIVES = 2
_DAMAGED: tuple[type[Exception], ...] = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError,
    LookupError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        name: With slashes, as it is written behind the archive's path.
        size: Bytes, unpacked.
        problem: Why it is not read, or "".
    """

    name: str
    size: int
    problem: str = ""


@dataclass(frozen=True)
class _Opened:
    """An archive at work.

    Attributes:
        members: By name.
        problem: Why it may hold more than `members`, or "".
        open: Opens a member by its name.
        close: Ends it.
    """

    members: dict[str, Member]
    problem: str
    open: Callable[[str], io.BufferedIOBase]
    close: Callable[[], None]


def is_archive(name: str) -> bool:
    """Tell by its name whether a file is an archive that is read."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_of(path: Path) -> Path | None:
    """Return the archive in which a path lies, or None for a file of its own."""
    return next((folder for folder in path.parents if is_archive(folder.name) and folder.is_file()), None)


def archive_members(path: Path) -> tuple[list[Member], str]:
    """Return the files of an archive in its own order, and why there may be more, or "".

    Raises:
        OSError: The system cannot read it.
    """
    try:
        opened = _opened(path)
    except VolumeError as error:
        return [], str(error)
    return list(opened.members.values()), opened.problem


def files_below(path: Path) -> Iterator[Path]:
    """Yield a file, or every file of a folder, an archive or a folder in one, and those in them; in a fixed order.

    An archive that cannot be read stands for itself.
    """
    if path.is_dir():
        for folder, subfolders, names in os.walk(path):
            subfolders.sort()
            for name in sorted(names):
                yield from files_below(Path(folder, name))
    elif (listed := _listed(path)) is not None:
        files, problem = listed
        yield from files
        if problem:
            yield path
    else:
        yield path


def is_packed_folder(path: Path) -> bool:
    """Tell whether a path is an archive, or a folder in one."""
    return _listed(path) is not None


def _listed(path: Path) -> tuple[list[Path], str] | None:
    """Return the files of an archive or of a folder in one, and why there may be more; None of another path."""
    if is_archive(path.name) and path.is_file():
        members, problem = archive_members(path)
        return [path / member.name for member in members], problem
    archive = archive_of(path)
    if archive is None:
        return None
    files = [archive / member.name for member in archive_members(archive)[0]]
    return ([file for file in files if path in file.parents], "") if any(path in file.parents for file in files) else None


def problem_of(path: Path) -> str:
    """Return why a member, or an archive, cannot be read, or ""; of another file nothing is said."""
    archive = archive_of(path)
    if archive is None:
        return archive_members(path)[1] if is_archive(path.name) and path.is_file() else ""
    with suppress(VolumeError):
        return _member(archive, path)[1].problem
    return "is not in its archive"


def open_file(path: Path) -> IO[bytes]:
    """Open a file, or a file in an archive.

    Raises:
        OSError: The system cannot read it.
        VolumeError: Its archive is damaged, or says of it what cannot be.
    """
    archive = archive_of(path)
    if archive is None:
        return path.open("rb")
    opened, member = _member(archive, path)
    if member.problem:
        raise VolumeError(member.problem)
    try:
        return io.BufferedReader(_MemberStream(opened.open(member.name)), 1 << 16)
    except _DAMAGED as error:
        raise VolumeError("its archive is truncated or damaged") from error


def file_size(path: Path) -> int:
    """Return the bytes of a file, or of a file in an archive; raises as `open_file`."""
    archive = archive_of(path)
    return path.stat().st_size if archive is None else _member(archive, path)[1].size


class _MemberStream(io.RawIOBase):
    """A file of an archive; what is wrong with its data is an EOFError, as of a file that is cut off."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self.name, self.mode = "", "rb"  # pydicom asks every stream for a name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self._stream.read(min(len(view), _MOST_AT_ONCE_BYTES))
        except _DAMAGED as error:
            raise EOFError("its archive is truncated or damaged") from error
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._stream.seek(offset, whence)
        except _DAMAGED as error:
            raise EOFError("its archive is truncated or damaged") from error

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Held(threading.local):
    """The archives that a thread has open: a forked process and another thread would share the place in the file."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.archives: dict[tuple[str, int, int], _Opened] = {}


_held = _Held()


def _opened(path: Path) -> _Opened:
    """Return an archive, opened before or now.

    Raises:
        OSError: The system cannot read it.
        VolumeError: It is damaged, or too much.
    """
    if _held.pid != os.getpid():
        _held.pid, _held.archives = os.getpid(), {}
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _held.archives:
        while len(_held.archives) >= _OPEN_ARCHIVES:
            _held.archives.pop(next(iter(_held.archives))).close()
        try:
            _held.archives[key] = _zip(path) if path.name.lower().endswith(".zip") else _tar(path)
        except _DAMAGED as error:
            raise VolumeError("archive is truncated or damaged") from error
    return _held.archives[key]


def _member(archive: Path, path: Path) -> tuple[_Opened, Member]:
    opened = _opened(archive)
    member = opened.members.get(path.relative_to(archive).as_posix())
    if member is None:
        raise VolumeError("is not in its archive")
    return opened, member


def _zip(path: Path) -> _Opened:
    with path.open("rb") as stream:
        if _zip_index_bytes(stream) > _MOST_INDEX_BYTES:
            raise VolumeError(f"archive says that it holds more than {_MOST_MEMBERS} files")
    file = zipfile.ZipFile(path)
    infos: dict[str, zipfile.ZipInfo] = {}
    members: dict[str, Member] = {}
    for info in file.infolist():
        if info.is_dir():
            continue
        problem = ""
        if info.flag_bits & 1:
            problem = "is encrypted in its archive"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "is packed in its archive by a method that is not read"
        elif stat.S_ISLNK(info.external_attr >> 16):
            problem = "is a link in an archive"
        elif info.file_size > _MOST_PER_BYTE * info.compress_size + 64:
            problem = "its archive says that it unpacks to more than it can hold"
        name = _add(members, info.filename, info.file_size, problem)
        infos[name] = info

    def open_member(name: str) -> io.BufferedIOBase:
        opened = file.open(infos[name])
        assert isinstance(opened, io.BufferedIOBase)  # the standard library's own
        return opened

    return _Opened(members, "", open_member, file.close)


def _zip_index_bytes(stream: IO[bytes]) -> int:
    """Return how long a zip's list of members says that it is, read from the end of the file."""
    size = stream.seek(0, os.SEEK_END)
    start = max(0, size - (1 << 16) - 64)
    stream.seek(start)
    tail = stream.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise zipfile.BadZipFile
    large = tail.rfind(b"PK\6\6")
    return int.from_bytes(tail[large + 40 : large + 48] if large >= 0 else tail[end + 12 : end + 16], "little")


def _tar(path: Path) -> _Opened:
    stream, problem = _unpacked(path) if path.name.lower().endswith(_PACKED_SUFFIXES) else (path.open("rb"), "")
    infos: dict[str, tarfile.TarInfo] = {}
    members: dict[str, Member] = {}
    try:
        file = tarfile.TarFile(fileobj=_Frugal(stream))  # type: ignore[arg-type]
        for info in file:
            if len(members) >= _MOST_MEMBERS:
                raise VolumeError(f"archive holds more than {_MOST_MEMBERS} files")
            if info.issym() or info.islnk():
                _add(members, info.name, 0, "is a link in an archive")
            elif info.isreg():
                name = _add(members, info.name, info.size, "is a file with holes" if info.issparse() else "")
                infos[name] = info
    except VolumeError:
        stream.close()
        raise
    except _DAMAGED:
        if not members:
            stream.close()
            raise
        problem = "archive is truncated or damaged"

    def open_member(name: str) -> io.BufferedIOBase:
        opened = file.extractfile(infos[name])
        assert isinstance(opened, io.BufferedIOBase)  # a regular file
        return opened

    return _Opened(members, problem, open_member, stream.close)


class _Frugal:
    """A tar file whose headers ask for no memory beyond what a name may need; `_MemberStream` reads the rest in pieces."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 16 * _MOST_AT_ONCE_BYTES:
            raise tarfile.ReadError("a header that is too long")
        return self._stream.read(size)


def _unpacked(path: Path) -> tuple[IO[bytes], str]:
    """Return what a packed tar holds, and why that may not be all."""
    unpacked = tempfile.SpooledTemporaryFile(_HELD_IN_MEMORY_BYTES)  # noqa: SIM115 - it lives as long as the archive
    problem = ""
    try:
        # Not ISA-L's reader, which keeps back what comes before the end of a file that is cut off; nor its read(), likewise.
        with gzip.open(path, "rb") as stream:
            while block := stream.read1(_MOST_AT_ONCE_BYTES):
                unpacked.write(block)
                if unpacked.tell() > _MOST_UNPACKED_BYTES:
                    raise VolumeError(
                        f"packed tar holds more than {_MOST_UNPACKED_BYTES >> 30} GiB: gunzip it, a plain .tar may be larger"
                    )
    except _DAMAGED:
        problem = "archive is truncated or damaged"
    except BaseException:
        unpacked.close()
        raise
    unpacked.seek(0)
    return unpacked, problem


def _add(members: dict[str, Member], written: str, size: int, problem: str) -> str:
    """Add a member under its plain name and return that."""
    path = PurePosixPath(written)
    name = str(path)
    if path.is_absolute() or ".." in path.parts:
        name, problem = name.replace("..", "__").lstrip("/") or "_", "its name leads out of its archive"
    elif name in members:
        problem = "its archive has several files of its name"
    elif size > _MOST_MEMBER_BYTES:
        problem = f"unpacks to more than {_MOST_MEMBER_BYTES >> 30} GiB"
    members[name] = replace(members[name], problem=problem) if name in members else Member(name, size, problem)
    return name
