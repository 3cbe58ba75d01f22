"""The folder of a run's results: what lies there is written over only where such a run has begun it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from meddino.core.config import to_yaml
from meddino.core.errors import ConfigError
from meddino.core.files import write_text

SETTINGS = "config.yaml"
HEADER = "# The settings of this run, written by meddino-eval. Without this line the folder is taken for somebody else's.\n"


def refuse_files_of_others(out: Path, files: Sequence[str]) -> None:
    """Refuse a folder whose files would be lost: they have the names of results, and no run was begun there.

    Args:
        out: Folder of the results; it need not be there.
        files: Names of the results in it, beside `SETTINGS`.

    Raises:
        ConfigError: Names a file.
    """
    found = [name for name in (SETTINGS, *files) if (out / name).exists()]
    if found and not _is_begun(out):
        raise ConfigError(
            f"--out {out} holds '{found[0]}', and no run was begun there ('{SETTINGS}' of a run is missing); name a new or "
            "empty folder, or move what is there"
        )


def write_settings(out: Path, config: BaseModel) -> None:
    """Write the settings of a run, before any result: from then on the folder is that run's."""
    write_text(out / SETTINGS, HEADER + to_yaml(config))


def _is_begun(out: Path) -> bool:
    try:
        return (out / SETTINGS).read_bytes().startswith(HEADER.encode())
    except OSError:
        return False
