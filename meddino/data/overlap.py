"""What is in a corpus: content hashes from its manifests, read in seconds; for training and evaluation alike."""

from meddino.core.logging import get_logger
from meddino.data.content import slice_hash
from meddino.data.corpus import Corpus

PREFIX_LENGTH = 16  # of 32 hex digits: among a million volumes two alike come by chance once in 4e7 corpora
VOLUMES_FILE = "training_volumes.txt"  # in runs and exports: a content key a line
IN_TRAINING = ("accepted", "duplicate")  # a duplicate's scan is in the corpus in another guise
_logger = get_logger(__name__)


def content_key(content_hash: str) -> str:
    """Return what lists of training volumes hold of a content hash."""
    return content_hash[:PREFIX_LENGTH]


def volume_hashes(corpus: Corpus) -> frozenset[str]:
    """Return the content hashes of the volumes whose scans are in a corpus, duplicates that were left out included."""
    rows = corpus.volumes.select(["status", "content_hash"]).to_pylist()
    return frozenset(str(row["content_hash"]) for row in rows if row["content_hash"] and row["status"] in IN_TRAINING)


def slice_hashes(corpus: Corpus) -> frozenset[str]:
    """Return `content.slice_hash` of every slice of a corpus; only corpora of schema 1 have to be decoded for it."""
    written = corpus.slices.column("content_hash")
    if written.null_count:
        _logger.info("%s is of schema 1: decoding %d slices to compare them", corpus.location, len(corpus))
        return frozenset(slice_hash(corpus.read(index)) for index in range(len(corpus)))
    return frozenset(written.to_pylist())
