"""The folder of a run's results: what lies there is written over only where the same command has begun it."""

from collections.abc import Sequence
from pathlib import Path

from meddino.core.errors import ConfigError


def refuse_files_of_others(out: Path, files: Sequence[str], begun: str) -> None:
    """Refuse a folder whose files would be lost: they have the names of results, and no run was begun there.

    Args:
        out: Folder of the results; it need not be there.
        files: Names of the results in it.
        begun: What the command writes before any of them, so that the same command goes on in its own folder.

    Raises:
        ConfigError: Names a file.
    """
    found = [name for name in files if (out / name).exists()]
    if found and not (out / begun).exists():
        raise ConfigError(
            f"--out {out} holds '{found[0]}', and no run was begun there ('{begun}' is missing); name a new or empty folder"
        )
