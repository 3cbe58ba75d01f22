"""What ties ids to patients: a salt and a source map, both outside the corpus and readable by their owner only."""

import csv
import hashlib
import hmac
import io
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write, canonical_json, write_text

ID_BYTES = 10  # 80 bits: a clash among a million volumes has a chance of 4e-13
REFUSED = "refused.csv"
_MIN_SALT_CHARACTERS = 8


def private_folder(out: Path) -> Path:
    """Return the folder beside a corpus that holds what must not leave the house with it.

    Raises:
        ConfigError: The corpus is to be the root of the file system, beside which there is nothing.
    """
    if out.name in ("", ".."):  # "." and what ends so: their names are those of the folders they mean
        out = out.resolve()
    if not out.name:
        raise ConfigError(f"--out {out} cannot be a corpus; name a new or empty folder")
    return out.with_name(f"{out.name}.private")


class Salt:
    """Makes ids that cannot be turned back into names without the salt."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key(self, kind: str, *parts: str) -> str:
        """Return a salted hash as hex.

        Args:
            kind: "volume", "patient", "series", ...: equal names of different kinds give different ids.
            parts: What is hashed.
        """
        text = "\x1f".join([kind, *parts]).encode("utf-8", "surrogateescape")
        return hmac.new(self._secret, text, hashlib.sha256).digest()[:ID_BYTES].hex()

    @property
    def fingerprint(self) -> str:
        """Tells salts apart without giving them away."""
        return self.key("salt")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def load_salt(file: Path | None, out: Path) -> Salt:
    """Read the salt, or make one at random where none is asked for and none exists.

    Args:
        file: `privacy.salt_file`; None is `<corpus>.private/salt`.
        out: The corpus.

    Raises:
        ConfigError: The file is missing, too short, or lies inside the corpus.
    """
    if file is None:
        path = private_folder(out) / "salt"
        if not path.exists():
            make_private(path.parent)
            _create_once(path, secrets.token_hex(32))
    else:
        path = file
    if path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"privacy.salt_file {path} lies inside the corpus {out}; it must not travel with it")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"privacy.salt_file {path} cannot be read ({type(error).__name__})") from error
    if len(text) < _MIN_SALT_CHARACTERS:
        raise ConfigError(f"privacy.salt_file {path} holds {len(text)} characters; at least {_MIN_SALT_CHARACTERS} are needed")
    return Salt(text.encode())


def _create_once(path: Path, text: str) -> None:
    """Write a file that several jobs may want to make at the same moment; the first one wins."""
    own = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write_text(own, text + "\n")
    own.chmod(0o600)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def write_source_map(folder: Path, name: str, entries: Iterable[tuple[str, str, str]]) -> None:
    """Write which volume came from where, for the owner's eyes.

    Args:
        folder: From `private_folder`.
        name: File name without ending.
        entries: (volume_id, name of the source, path inside it or description), in any order.
    """
    make_private(folder)
    with atomic_write(folder / f"{name}.jsonl") as stream:
        for volume_id, source, source_path in sorted(entries):
            line = canonical_json({"volume_id": volume_id, "source": source, "source_path": source_path})
            stream.write(line.encode("utf-8", "surrogateescape") + b"\n")
    (folder / f"{name}.jsonl").chmod(0o600)


def write_refusals(folder: Path, rows: Iterable[Mapping[str, Any]], entries: Iterable[tuple[str, str, str]]) -> None:
    """Write what was refused or left out as a duplicate, with its file and the reason, for the owner's eyes.

    Args:
        folder: From `private_folder`; gets refused.csv.
        rows: Of volumes.parquet.
        entries: As in `write_source_map`.
    """
    places = {volume_id: (source, place) for volume_id, source, place in entries}
    lines = []
    for row in rows:
        if row["status"] in ("rejected", "duplicate"):
            source, place = places.get(row["volume_id"], (row["dataset"], ""))
            kept = "/".join(places.get(row["duplicate_of"], ("", str(row["duplicate_of"]))))
            reason = row["reason"] or f"{row['duplicate_kind']} duplicate of {kept}"
            lines.append((source, place, row["status"], reason, row["volume_id"]))
    make_private(folder)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("source", "file", "status", "reason", "volume_id"))
    writer.writerows(sorted(lines))
    with atomic_write(folder / REFUSED) as file:
        file.write(stream.getvalue().encode("utf-8", "surrogateescape"))
    (folder / REFUSED).chmod(0o600)
