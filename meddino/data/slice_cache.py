"""Bytes fetched from elsewhere, kept on the local disk up to a limit; what was used longest ago goes first."""

import os
from contextlib import suppress
from pathlib import Path

from meddino.core.errors import ConfigError
from meddino.core.files import PARTIAL_SUFFIX, is_disk_full

DEFAULT_CACHE_GIB = 32.0
_KEEP_FRACTION = 0.9  # of the limit is left after clearing out, so that it is not done for every slice
_LOOK_AGAIN_FRACTION = 0.05  # of the limit written by this process: then the folder, which others fill too, is measured


def cache_folder() -> Path:
    """Return where fetched bytes are kept: MEDDINO_CACHE_DIR, or meddino in the user's cache folder."""
    given = os.environ.get("MEDDINO_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meddino"


def cache_limit_bytes() -> int:
    """Return how much may be kept: MEDDINO_CACHE_GIB, or `DEFAULT_CACHE_GIB`.

    Raises:
        ConfigError: It is no number, or negative.
    """
    text = os.environ.get("MEDDINO_CACHE_GIB", str(DEFAULT_CACHE_GIB))
    try:
        limit = float(text)
    except ValueError as error:
        raise ConfigError(f"MEDDINO_CACHE_GIB={text} is no number; give GiB, 0 keeps nothing") from error
    if not 0 <= limit < 2**33:
        raise ConfigError(f"MEDDINO_CACHE_GIB={text}: give GiB, 0 or more")
    return int(limit * 2**30)


class SliceCache:
    """Small files in a folder, written whole or not at all; several processes may share it.

    Attributes:
        root: The folder.
        limit_bytes: What it may hold; 0 keeps nothing.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._unseen_bytes = limit_bytes  # the first write measures what earlier runs left

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name, or None."""
        path = self.root / name
        try:
            data = path.read_bytes()
            os.utime(path)  # used now: goes last
        except OSError:
            return None  # never kept, or cleared out by another process
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name; a full disk keeps nothing and is no error."""
        if len(data) > self.limit_bytes:
            return
        path = self.root / name
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)  # without fsync: whoever reads it compares its checksum
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            if not is_disk_full(error):
                raise
            return
        self._unseen_bytes += len(data)
        if self._unseen_bytes > _LOOK_AGAIN_FRACTION * self.limit_bytes:
            self._clear_out()
            self._unseen_bytes = 0

    def drop(self, name: str) -> None:
        """Forget what is kept under a name."""
        with suppress(FileNotFoundError):
            (self.root / name).unlink()

    def _clear_out(self) -> None:
        kept = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        if total <= (1 - _LOOK_AGAIN_FRACTION) * self.limit_bytes:
            return
        for _, size, path in sorted(kept):
            if total <= _KEEP_FRACTION * self.limit_bytes:
                return
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size
