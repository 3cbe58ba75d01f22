"""Which corrupt samples a run has met, over all its processes, stages and interruptions."""

from collections.abc import Iterable, Sequence

from meddino.core.errors import ShardError
from meddino.core.logging import get_logger
from meddino.distributed.collectives import all_gather_strings, is_main

NAMED_IN_ERROR = 5
logger = get_logger(__name__)


class CorruptSamples:
    """The different corrupt samples met so far: the same set in every process, and part of every checkpoint.

    Attributes:
        keys: The slices' keys.
    """

    def __init__(self, corpus: str, allowed: int, keys: Iterable[str] = ()) -> None:
        """Go on from what is known.

        Args:
            corpus: Where the slices lie, for messages.
            allowed: How many may be met before the run stops.
            keys: What the run has met already.
        """
        self.corpus, self.allowed, self.keys = corpus, allowed, set(keys)

    def add(self, met: Sequence[tuple[str, str]]) -> None:
        """Add what the processes met in one step. Every process must call it, also one that met nothing.

        Args:
            met: (key, what is wrong) of each slice that this process met.
        """
        flat = all_gather_strings([text for pair in met for text in pair])
        for key, wrong in zip(flat[::2], flat[1::2], strict=True):
            if key not in self.keys and is_main():
                logger.warning("corrupt sample, another is taken for it: %s", wrong)
            self.keys.add(key)

    def error(self) -> ShardError | None:
        """Return what is wrong where more were met than are allowed."""
        if len(self.keys) <= self.allowed:
            return None
        named = ", ".join(sorted(self.keys)[:NAMED_IN_ERROR])
        more = ", ..." if len(self.keys) > NAMED_IN_ERROR else ""
        return ShardError(
            f"{len(self.keys)} corrupt samples of corpus {self.corpus} were met, loader.max_corrupt allows {self.allowed}: "
            f"{named}{more}. All is saved: repair the corpus's files (`meddino-curate verify {self.corpus}` lists what is "
            "wrong) or allow more, and run the same command again"
        )

    def check(self) -> None:
        """Raise ShardError where more were met than are allowed."""
        if (error := self.error()) is not None:
            raise error
