"""The folder of a run's results: what lies there is written over only where such a run has begun it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from meddino.core.config import to_yaml
from meddino.core.errors import ConfigError
from meddino.core.files import write_text

SETTINGS = "config.yaml"
_MARK = "# The settings of this"


def refuse_files_of_others(
    out: Path, files: Sequence[str], settings: str = SETTINGS, what: str = "run", begun: bool = False
) -> None:
    """Refuse a folder whose files would be lost: they have the names of results, and no run was begun there.

    Args:
        out: Folder of the results; it need not be there.
        files: Names of the results in it, beside `settings`.
        settings: Name of the file with which a run begins.
        what: What a run is called; one of another kind does not count.
        begun: What lies there is known to be the run's, whatever the settings say.

    Raises:
        ConfigError: Names a file.
    """
    found = [name for name in (settings, *files) if (out / name).exists()]
    if found and not begun and not is_begun(out, settings, what):
        raise ConfigError(
            f"--out {out} holds '{found[0]}', and no {what} was begun there ('{settings}' of a {what} is missing); name a new "
            "or empty folder, or move what is there"
        )


def write_settings(out: Path, config: BaseModel) -> None:
    """Write the settings of a run, before any result: from then on the folder is that run's."""
    begin(out, to_yaml(config))


def begin(out: Path, content: str, settings: str = SETTINGS, what: str = "run") -> None:
    """Write the file with which a run begins, before any result: from then on the folder is that run's."""
    write_text(out / settings, _header(what) + content)


def is_begun(out: Path, settings: str, what: str) -> bool:
    """Tell whether a run of a kind has begun in a folder."""
    try:
        return (out / settings).read_bytes().startswith(_header(what).encode())
    except OSError:
        return False


def is_marked(out: Path, settings: str) -> bool:
    """Tell whether a file says that a run has begun, of whichever kind."""
    return (out / settings).is_file() and (out / settings).read_bytes().startswith(_MARK.encode())


def _header(what: str) -> str:
    return f"{_MARK} {what}, written by meddino-eval. Without this line the folder is taken for somebody else's.\n"
