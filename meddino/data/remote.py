"""A folder behind a URL, read by ranges: http(s) and s3 through fsspec, which is imported only where a URL is given."""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from meddino.core.errors import ShardError
from meddino.core.logging import get_logger

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.")
_PROTOCOLS = ("http", "https", "s3")
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5  # doubled from attempt to attempt
_TIMEOUT_S = 60.0
_PROBE_BYTES = 16
_PIECE_BYTES = 8 << 20

_logger = get_logger(__name__)


def corpus_location(text: str) -> "Path | str":
    """Return what a command was told of a corpus: a URL as it is written, anything else as a path.

    A path cannot hold a URL: it makes one slash of two.
    """
    return text if is_url(text) else Path(text)


def is_url(location: "Path | str") -> bool:
    """Tell whether this is a URL and no path."""
    return isinstance(location, str) and _URL.match(location) is not None


class RemoteFolder:
    """Files below a URL.

    Safe to use from several processes after a fork or spawn: each opens its own connections.

    Attributes:
        url: Without a slash at the end, and without a password: it stands in messages.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of a folder; nothing is asked of the server yet.

        Raises:
            ShardError: What the URL needs is not installed, or its protocol is none that is read.
        """
        protocol = url.partition("://")[0].lower()
        if protocol not in _PROTOCOLS:
            raise ShardError(
                f"{protocol}:// is not read; allowed: {', '.join(f'{name}://' for name in _PROTOCOLS)}, or a folder"
            )
        self._url = url.rstrip("/")
        self.url = re.sub(r"://[^/@]*@", "://", self._url)
        self._opened: tuple[int, Any] | None = None
        self._files()

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind when sent to another process."""
        return {**self.__dict__, "_opened": None}

    def check_ranges(self, name: str) -> None:
        """Make sure that the server gives parts of files, on one that is small.

        Raises:
            ShardError: It does not, or cannot be reached.
        """
        found = self._ask(name, lambda files, path: files.cat_file(path, start=0, end=_PROBE_BYTES))
        if len(found) != _PROBE_BYTES:
            raise ShardError(
                f"{self.url}: the server does not answer range requests (asked for {_PROBE_BYTES} bytes of {name}, got "
                f"{len(found)}), so that slices cannot be read one by one; use a server that does (nginx, caddy, s3), "
                "or copy the corpus"
            )

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            ShardError: It is not there, or the server cannot be reached.
        """
        return bytes(self._ask(name, lambda files, path: files.cat_file(path)))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes of a file from `offset`, fewer where it ends before.

        Raises:
            ShardError: It is not there, or the server cannot be reached.
        """
        return bytes(self._ask(name, lambda files, path: files.cat_file(path, start=offset, end=offset + length)))

    def size(self, name: str) -> int | None:
        """Return a file's length in bytes, or None where there is no such file."""
        try:
            return int(self._ask(name, lambda files, path: files.size(path)))
        except RemoteFileMissing:
            return None

    def sha256(self, name: str, length: int) -> str:
        """Return the SHA-256 of a file of known length, read piece by piece.

        Raises:
            ShardError: It is not there, or the server cannot be reached.
        """
        digest = hashlib.sha256()
        for piece in self._pieces(name, length):
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, name: str, length: int) -> Iterator[bytes]:
        for offset in range(0, length, _PIECE_BYTES):
            yield self.read_range(name, offset, min(_PIECE_BYTES, length - offset))

    def _files(self) -> Any:
        # A forked process must not use its parent's connections, nor the thread that serves them: it has none.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _file_system(self._url))
        return self._opened[1]

    def _ask(self, name: str, request: Callable[[Any, str], Any]) -> Any:
        where = f"{self.url}/{name}"
        for attempt in range(_ATTEMPTS):
            try:
                return request(self._files(), f"{self._url}/{name}")
            except FileNotFoundError as error:
                raise RemoteFileMissing(f"{where}: no such file on the server (404)") from error
            except _network_errors() as error:
                status = getattr(error, "status", None)
                refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
                if refused or isinstance(error, PermissionError) or attempt == _ATTEMPTS - 1:
                    raise ShardError(f"{where}: {_cause(error, status)}") from error
                _logger.debug("%s: attempt %d failed", where, attempt + 1)
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError  # the last attempt returns or raises


class RemoteFileMissing(ShardError):
    """The server has no such file."""


def _file_system(url: str) -> Any:
    try:
        import fsspec

        scheme = url.split("://", 1)[0]
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_TIMEOUT_S)
            # Bytes as they lie on the disk: a packed answer would have another length than was asked for.
            options = {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}
            return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        raise ShardError(f"reading {url} needs packages that are not installed: pip install 'meddino[remote]'") from error


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return what the libraries in use raise where a server fails; OSError holds refused and broken connections."""
    found: list[type[BaseException]] = [OSError, TimeoutError]
    if "aiohttp" in sys.modules:
        found.append(sys.modules["aiohttp"].ClientError)
    if "botocore.exceptions" in sys.modules:
        known = sys.modules["botocore.exceptions"]
        found += [known.BotoCoreError, known.ClientError]
    return tuple(found)


def _cause(error: BaseException, status: int | None) -> str:
    if status is not None:
        return f"the server answers {status} ({getattr(error, 'message', '') or 'no reason given'})"
    if isinstance(error, PermissionError):
        return "the server refuses access; look at your credentials"
    if type(error).__name__ == "NoCredentialsError":  # botocore's, which is imported for s3 only
        return "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    return f"the server cannot be reached, or broke off ({type(error).__name__}: {error})"
