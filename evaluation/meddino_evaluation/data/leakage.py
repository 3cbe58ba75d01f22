"""Test volumes that a model has seen in pretraining: found by the content of their voxels, named, and marked in every table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meddino.checkpoints.export.lineage import training_volumes
from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus
from meddino.data.overlap import content_key, slice_hashes, volume_hashes
from meddino.data.remote import corpus_location

logger = get_logger(__name__)


class LeakageCheck:
    """Compares test volumes with those of the pretraining corpus.

    Args:
        lineage: Of the export; {} for weights that say nothing of their data.
        corpus: The corpus itself, whose volumes.parquet lists the content hashes; None if it is not at hand.
        model: The export, which carries a list of the corpus's volumes: compared with it where no corpus is given.
        slices: Single slices of the corpus's volumes count too.

    Attributes:
        known: Whether the pretraining volumes are known.
        source: What they are known from.
        overlap: Names of the test cases that are among them.

    Raises:
        ConfigError: The corpus is not the one that the lineage names.
    """

    def __init__(self, lineage: Mapping[str, Any], corpus: Path | str | None, model: str = "", *, slices: bool = False) -> None:
        self.overlap: list[str] = []
        self._keys: frozenset[str] | None = None
        self.source = "nothing"
        if corpus is None:
            self._keys = training_volumes(model) if model else None
            self.source = "nothing" if self._keys is None else "the list in the export"
            return
        opened = Corpus(corpus_location(str(corpus)))
        named = lineage.get("corpus_hash")
        if named is not None and named != opened.content_hash:
            raise ConfigError(
                f"--corpus {corpus} has the content hash {opened.content_hash[:16]}..., but the model was pretrained on "
                f"{str(named)[:16]}...; give that corpus"
            )
        known = volume_hashes(opened) | (slice_hashes(opened) if slices else frozenset())
        self._keys = frozenset(content_key(name) for name in known)
        self.source = "the corpus"

    @property
    def known(self) -> bool:
        """Whether the pretraining volumes are known."""
        return self._keys is not None

    def look(self, case: str, *hashes: str) -> bool:
        """Note a case if its volume, or one of its slices, is in the corpus, and tell whether it is."""
        seen = self._keys is not None and any(content_key(one) in self._keys for one in hashes)
        if seen and case not in self.overlap:
            self.overlap.append(case)
            logger.warning("case %s is in the corpus that the model was pretrained on", case)
        return seen

    def summary(self) -> dict[str, Any]:
        """Return what metrics.json says about it."""
        return {
            "checked": self.known,
            "compared_with": self.source,
            "kinds": ["exact"] if self.known else [],  # near duplicates: meddino-curate audit CORPUS --against DATASET
            "test_cases_in_pretraining": sorted(self.overlap),
        }
