"""`meddino-curate merge`: the parts of a job array made one corpus, with the bytes that one job would have made."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.core.files import PARTIAL_SUFFIX
from meddino_data_curation.changes.grow import merge_finished
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.build import build, check_out, say_finished
from meddino_data_curation.corpus.work_folder import WorkFolder
from meddino_data_curation.privacy import make_private, private_folder


def merge(parts: Sequence[Path], out: Path) -> None:
    """Join parts, or finished corpora, to one corpus; the same command again goes on, or has nothing to do.

    Args:
        parts: Output folders of `build --part`, which may have shared one; or corpora that are finished.
        out: The corpus; may be one of them.

    Raises:
        ConfigError: A part is missing or unfinished, parts do not belong together, or `out` holds something else.
    """
    if len(parts) > 1 and all((part / "corpus.json").is_file() and part.resolve() != out.resolve() for part in parts):
        merge_finished(parts, out)
        return
    others = [folder for folder in parts if folder.resolve() != out.resolve()]
    finished = _finished_inputs(out)
    if finished and {note["inputs"] for folder in others for note in _notes(folder)} <= {finished}:
        say_finished(out)  # the notes of a part that was done in `out` went with its work folder
        return
    if finished or (out / "corpus.json").exists():
        raise ConfigError(f"--out {out} is a finished corpus of other files or another config; name a new folder")
    listed = _check_complete(parts)
    check_out(out)
    with WorkFolder(out).locked(shared=False):
        for folder in others:
            _take_over(folder, out)
    config = private_folder(parts[0]) / "build.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    build(check_config(CurationConfig, values, where=str(config)), out, listed_before=listed)


def _finished_inputs(out: Path) -> str:
    """Return what a finished corpus was made of, or "" where there is none."""
    path = private_folder(out) / "inputs.json"
    if not (out / "corpus.json").is_file() or not path.is_file():
        return ""
    return str(json.loads(path.read_text(encoding="utf-8"))["inputs"])


def _notes(folder: Path) -> list[dict[str, Any]]:
    """Return what the finished parts of a folder say of themselves: index, count, inputs."""
    written = sorted((WorkFolder(folder).root / "parts").glob("*.json"))
    if not written:
        raise ConfigError(f"{folder} holds no finished part; run its `meddino-curate build ... --part i/n` to the end")
    return [json.loads(path.read_text(encoding="utf-8")) for path in written]


def _check_complete(parts: Sequence[Path]) -> str | None:
    """Return the digest of what lists named, if all parts are there and belong together."""
    notes = [note for folder in parts for note in _notes(folder)]
    counts, inputs = {note["count"] for note in notes}, {note["inputs"] for note in notes}
    if len(counts) > 1 or len(inputs) > 1:
        raise ConfigError("the parts do not belong together: other files, another config, another salt or number of parts")
    missing = sorted(set(range(1, counts.pop() + 1)) - {note["index"] for note in notes})
    if missing:
        raise ConfigError(f"parts are missing: {', '.join(str(index) for index in missing)}; build them, then merge again")
    digest = notes[0].get("listed")  # an earlier version wrote none
    return None if digest is None else str(digest)


def _take_over(folder: Path, out: Path) -> None:
    """Copy what a part has done, file by whole file; the part itself stays as it is."""
    work, target = WorkFolder(folder), WorkFolder(out)
    in_shards = {volume_id for note in target.shard_notes().values() for volume_id, _, _ in note["volumes"]}
    for path in sorted((work.root / "volumes").glob("*/*")):  # none where a part had no volume to do
        if path.suffix != PARTIAL_SUFFIX and not (path.stem in in_shards and path.suffix != ".json"):
            _copy_once(path, target.root / path.relative_to(work.root))
    salt, own = private_folder(folder) / "salt", private_folder(out) / "salt"
    if salt.exists() and not own.exists():
        make_private(own.parent)
        _copy_once(salt, own)
    elif salt.exists() and salt.read_bytes() != own.read_bytes():
        raise ConfigError(f"{own} is another salt than that of {folder}; name a new --out")


def _copy_once(source: Path, target: Path) -> None:
    """Copy a file unless it has been copied: a merge that was killed goes on where it stood."""
    status = source.stat()
    if target.exists() and (target.stat().st_size, target.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns):
        return
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, partial)
    partial.replace(target)
