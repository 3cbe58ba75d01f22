"""`meddino-curate merge`: the parts of a job array made one corpus, with the bytes that one job would have made."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino_data_curation.build import build
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.privacy import private_folder
from meddino_data_curation.work_folder import WorkFolder


def merge(parts: Sequence[Path], out: Path) -> None:
    """Join parts and finish the corpus.

    Args:
        parts: Output folders of `build --part`; all parts may have shared one.
        out: The corpus; may be one of them.

    Raises:
        ConfigError: A part is missing or unfinished, or parts do not belong together.
    """
    notes = []
    for folder in parts:
        written = sorted((WorkFolder(folder).root / "parts").glob("*.json"))
        own = [json.loads(path.read_text(encoding="utf-8")) for path in written]
        if not own:
            raise ConfigError(f"{folder} holds no finished part; run its `meddino-curate build ... --part i/n` to the end")
        notes += own
    counts, inputs = {note["count"] for note in notes}, {note["inputs"] for note in notes}
    if len(counts) > 1 or len(inputs) > 1:
        raise ConfigError("the parts do not belong together: other files, another config, another salt or number of parts")
    missing = sorted(set(range(1, counts.pop() + 1)) - {note["index"] for note in notes})
    if missing:
        raise ConfigError(f"parts are missing: {', '.join(str(index) for index in missing)}; build them, then merge again")
    if out not in parts and out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; name a new folder or one of the parts")
    for folder in parts:
        if folder.resolve() != out.resolve():
            _take_over(folder, out)
    config = private_folder(parts[0]) / "build.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    build(check_config(CurationConfig, values, where=str(config)), out)


def _take_over(folder: Path, out: Path) -> None:
    """Copy what a part has done; the part itself stays as it is."""
    done = WorkFolder(folder).root / "volumes"
    if done.is_dir():  # a part may have had no volume to do
        shutil.copytree(done, WorkFolder(out).root / "volumes", dirs_exist_ok=True)
    salt = private_folder(folder) / "salt"
    if salt.exists() and not (private_folder(out) / "salt").exists():
        private_folder(out).mkdir(parents=True, exist_ok=True)
        private_folder(out).chmod(0o700)
        shutil.copy2(salt, private_folder(out) / "salt")
