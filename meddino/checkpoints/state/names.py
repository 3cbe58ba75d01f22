"""How checkpoints of a stage are called, which there are, and which stay: by name alone, contents are not looked at."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from meddino.core.logging import get_logger

META_FILE = "meta.json"

_NAME = re.compile(r"step-(\d{9,})")
_LEFTOVER = re.compile(r"step-\d{9,}\.\d+\.(partial|old)")
_log = get_logger(__name__)


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step: `step-000000100`."""
    return f"step-{step:09d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders directly in a folder by name, oldest first; their contents are not looked at."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int = 0, keep: Iterable[Path] = ()) -> list[Path]:
    """Delete old checkpoints of a folder and what an interrupted save left behind. One process calls this.

    Args:
        folder: Holds `step-*` folders.
        keep_last: How many of the newest stay, >= 1.
        keep_every: Also keep steps that are multiples of this; 0 keeps none of them.
        keep: These stay too (for example the one that a Gram teacher comes from).

    Returns:
        The folders deleted.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint has to stay")
    wanted = {path.resolve() for path in keep}
    deleted = []
    for path in list_checkpoints(folder)[:-keep_last]:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if path.resolve() in wanted or (keep_every and int(match[1]) % keep_every == 0):
            continue
        # meta.json goes first: a deletion that is interrupted leaves no folder that looks complete.
        (path / META_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)
        deleted.append(path)
    remove_leftovers(folder)
    return deleted


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            _log.info("removing %s, left by an interrupted save", path)
            shutil.rmtree(path, ignore_errors=True)
