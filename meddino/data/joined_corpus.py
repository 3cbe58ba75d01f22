"""Several corpora read as one: the slices of the first, then those of the second, and so on."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meddino.core.errors import ShardError
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus

_logger = get_logger(__name__)


def open_corpora(locations: Sequence[Path | str]) -> Corpus:
    """Open one corpus, or several that are read as one.

    Args:
        locations: Folders or URLs, each once; their order is part of the order of samples.

    Raises:
        ShardError: One of them cannot be read, or is given twice.
    """
    twice = [location for location, count in Counter(map(str, locations)).items() if count > 1]
    if twice:
        raise ShardError(f"corpus {twice[0]} is given twice; to see its slices more often, give it a weight")
    parts = [Corpus(location) for location in locations]
    return parts[0] if len(parts) == 1 else JoinedCorpus(parts)


class JoinedCorpus(Corpus):
    """Corpora read as one; see `Corpus`.

    Attributes:
        parts: The corpora, in the order of their slices.
    """

    def __init__(self, parts: Sequence[Corpus]) -> None:
        """Join opened corpora.

        Args:
            parts: At least one.
        """
        self._parts = tuple(parts)
        self.root, self.location = parts[0].root, " + ".join(part.location for part in parts)
        self.slices = pa.concat_tables([part.slices for part in parts])
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        content = "\n".join(part.content_hash for part in parts)
        self.info = {"content_hash": hashlib.sha256(content.encode()).hexdigest(), "audit": _joined_audits(parts)}
        common = [hash_ for hash_, count in Counter(name for part in parts for name in _contents(part)).items() if count > 1]
        if common:
            _logger.warning("%d volumes are in more than one of the corpora %s", len(common), self.location)

    @property
    def parts(self) -> tuple[Corpus, ...]:
        """The corpora, in the order of their slices."""
        return self._parts

    @cached_property
    def volumes(self) -> pa.Table:
        """The volume manifests, one after the other."""
        return pa.concat_tables([part.volumes for part in self.parts])

    def key(self, index: int) -> str:
        """Return the key of a slice, with its corpus: two corpora may use the same keys."""
        part, own = self._place(index)
        return f"{part.location}/{part.key(own)}"

    def read(self, index: int) -> NDArray[Any]:
        """Read one slice; see `Corpus.read`."""
        part, own = self._place(index)
        return part.read(own)

    def _place(self, index: int) -> tuple[Corpus, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])


def _contents(corpus: Corpus) -> set[str]:
    rows = corpus.volumes.select(["status", "content_hash"]).to_pylist()
    return {row["content_hash"] for row in rows if row["status"] == "accepted" and row["content_hash"]}


def _joined_audits(parts: Sequence[Corpus]) -> list[dict[str, Any]]:
    """Return the audits of all corpora; one that not every corpus underwent says of which it was."""
    by_name: dict[str, list[tuple[Corpus, dict[str, Any]]]] = {}
    for part in parts:
        for entry in part.info.get("audit", []):
            by_name.setdefault(str(entry["name"]), []).append((part, entry))
    joined = []
    for name, found in by_name.items():
        overlaps = sum(int(entry["overlaps"]) for _, entry in found)
        unread = sum(int(entry.get("unread", 0)) for _, entry in found)
        whole = len({part.location for part, _ in found}) == len(parts)
        told = name if whole else f"{name}, only {' and '.join(part.location for part, _ in found)}"
        joined.append({**found[0][1], "name": told, "overlaps": overlaps, "unread": unread})
    return joined
