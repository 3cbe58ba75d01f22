"""A finished corpus and what its owner keeps beside it, as one edition that another can be made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError
from meddino.data.corpus import Corpus
from meddino_data_curation.corpus.manifests import VOLUMES_WRITTEN, read_fingerprints
from meddino_data_curation.privacy import Salt, load_salt, private_folder
from meddino_data_curation.selection.fingerprint import Fingerprint

SourceEntry = tuple[str, str, str]  # volume_id, name of the source, path inside it or description


@dataclass(frozen=True)
class Edition:
    """A finished corpus without its pixels.

    Attributes:
        corpus: The corpus.
        rows: Of volumes.parquet.
        prints: Fingerprints of kept volumes.
        entries: The private source map; empty where it is not at hand.
        salt: Of its ids; None where it is not at hand.
    """

    corpus: Corpus
    rows: list[dict[str, Any]]
    prints: dict[str, Fingerprint]
    entries: list[SourceEntry]
    salt: Salt | None

    @property
    def source_names(self) -> list[str]:
        """Names of its sources."""
        return [str(source["name"]) for source in self.corpus.info.get("sources", [])]

    def need_salt(self) -> Salt:
        """Return the salt.

        Raises:
            ConfigError: It is not at hand.
        """
        if self.salt is None:
            where = private_folder(self.corpus.root) / "salt"
            raise ConfigError(f"the salt of {self.corpus.root} is needed ({where}, or --salt-file): no id is known without it")
        return self.salt


def read_edition(root: Path, salt_file: Path | None = None) -> Edition:
    """Read a finished corpus.

    Args:
        root: Its folder.
        salt_file: None takes `<corpus>.private/salt`, where that is.

    Raises:
        ShardError: It is no finished corpus.
        ConfigError: The salt is of another corpus.
    """
    corpus = Corpus(root)
    private = private_folder(root)
    path = salt_file or (private / "salt" if (private / "salt").is_file() else _built_with(private))
    salt = load_salt(path, root) if path is not None else None
    if salt is not None and salt.fingerprint != corpus.info.get("salt_fingerprint"):
        raise ConfigError(f"the salt in {path} is not the one {root} was made with")
    names = VOLUMES_WRITTEN.names
    rows = [{**dict.fromkeys(names), **row} for row in corpus.volumes.to_pylist()]
    for row in rows:
        row["slices_left_out"] = dict(row["slices_left_out"] or {})
    return Edition(corpus, rows, read_fingerprints(root / "fingerprints.parquet"), read_source_map(private), salt)


def _built_with(private: Path) -> Path | None:
    """Return the salt file that the build was given, if it is still there."""
    path = private / "build.json"
    if not path.is_file():
        return None
    given = json.loads(path.read_text(encoding="utf-8"))["privacy"]["salt_file"]
    return Path(given) if given and Path(given).is_file() else None


def read_source_map(private: Path) -> list[SourceEntry]:
    """Return what `write_source_map` wrote, of all parts."""
    entries = {}
    for path in sorted(private.glob("sources*.jsonl")):
        for line in path.read_bytes().decode("utf-8", "surrogateescape").splitlines():
            said = json.loads(line)
            entries[said["volume_id"]] = (said["volume_id"], said["source"], said.get("source_path", said.get("place")))
    return [entries[name] for name in sorted(entries)]
